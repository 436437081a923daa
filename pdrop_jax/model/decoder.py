"""The decoder: a stage is a run over its layers, a stage boundary is a drop.

``run_stages`` is the one loop over stages. Without ``past`` it runs whole buffers: training and prefill. With ``past``
the buffer's tokens come after those in the caches: a later turn of a conversation, or one token of a decode step.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pdrop_jax.batch import Bucket
from pdrop_jax.config import Implementation, LlavaConfig, Remat, TextConfig
from pdrop_jax.model.attention import attend_cache, attention
from pdrop_jax.model.cache import (
    StageCache,
    as_cached,
    cache_prompt,
    restored,
    write_in_all_layers,
    write_slots,
    write_tokens,
)
from pdrop_jax.model.decode_attention import attend_token, seen_slots
from pdrop_jax.model.drop import Boundary, DropRecord, Past, TokenBuffer, drop
from pdrop_jax.model.layers import decoder_layer, layer_of, rematerialise, scan_layers
from pdrop_jax.model.params import Params
from pdrop_jax.model.rope import Rope, rope_at, rope_tables, rotate, rotate_cached
from pdrop_jax.model.scores import find_score
from pdrop_jax.model.slot_attention import EVERYTHING, Places, Ring, attend_places, check_masks, sees, stage_places
from pdrop_jax.schedule import DropSchedule, Stage
from pdrop_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecodeState:
    """Where the next tokens continue.

    Attributes:
      caches: one for each stage, None for a stage without layers.
      lengths: (B,) int32 for each stage, valid slots of its cache.
      rope_delta: (B,) int32, with M-RoPE by how much the next position exceeds the tokens of the first stage, since a
        picture takes fewer positions than tokens; None without it.
      index: (B, C) int32 for each stage, the slots that the cached tokens had before any drop, where windows go by
        them; otherwise None.
      rings: for each stage, where the slots of its cache are in no order; otherwise None.
    """

    caches: tuple[StageCache | None, ...]
    lengths: tuple[jax.Array, ...]
    rope_delta: jax.Array | None = None
    index: tuple[jax.Array, ...] | None = None
    rings: tuple[Ring, ...] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecoderOutput:
    """Result of ``run_stages``.

    Attributes:
      buffer: the tokens of the last stage, ``hidden`` as its last layer returns it.
      state: of the stages that ran; its caches are None if none were asked for.
      drops: one for each stage boundary.
      layer_inputs: for each stage (L_s, B, S_s, D), or None if not asked for.
      first: the tokens of the first stage that ran, ``hidden`` as its last layer returns it; None if no stage ran.
    """

    buffer: TokenBuffer
    state: DecodeState
    drops: tuple[DropRecord, ...]
    layer_inputs: tuple[jax.Array | None, ...]
    first: TokenBuffer | None


def positions_of(
    schedule: DropSchedule,
    buffer: TokenBuffer,
    stage_length: jax.Array | int = 0,
    first_length: jax.Array | int = 0,
    *,
    dropped: bool = True,
) -> jax.Array:
    """Where rope turns the tokens to, (B, S) int32, or (B, S, 3) with M-RoPE; see ``DropSchedule.positions``.

    "original" are the positions before the first drop. "dense" are the slots after each drop; with M-RoPE the slot is
    all three positions from then on, and before the first drop tokens have their own.

    Args:
      stage_length: (B,) int32, tokens of earlier turns in the stage.
      first_length: (B,) int32, positions of earlier turns in the first stage.
      dropped: static, whether a drop was before these tokens' numbers.
    """
    if schedule.positions == "original" or (buffer.positions is not None and not dropped):
        if buffer.positions is not None:
            return buffer.positions + jnp.reshape(first_length, (-1, 1, 1))
        return buffer.index + jnp.reshape(first_length, (-1, 1))
    return jnp.broadcast_to(jnp.arange(buffer.slots) + jnp.reshape(stage_length, (-1, 1)), buffer.index.shape)


def rope_delta_of(buffer: TokenBuffer, past: DecodeState | None = None) -> jax.Array | None:
    """``DecodeState.rope_delta`` after the tokens of ``buffer``: the next position follows that of the last token.

    This is the largest position + 1, unless a clip's time runs ahead of the text behind it. Then transformers' model
    would continue after the clip, but its ``generate`` and a prefill of prompt and answer continue the text, as here.
    """
    if buffer.positions is None:
        return None if past is None else past.rope_delta
    last = jnp.take_along_axis(buffer.positions, (buffer.length - 1)[:, None, None], axis=1)  # (B, 1, 3)
    before = 0 if past is None or past.rope_delta is None else past.rope_delta
    return before + last.max((1, 2)) + 1 - buffer.length


def layer_windows(config: TextConfig, stage: Stage) -> jax.Array:
    """The window of each layer of a stage, (L_s,) int32, ``EVERYTHING`` without one."""
    windows = (config.window_of(layer) for layer in range(stage.start, stage.stop))
    return jnp.array([EVERYTHING if window is None else window for window in windows], jnp.int32)


def rope_in(window: jax.Array | int, ropes: Sequence[Rope]) -> Rope:
    """The rope of a layer with ``window`` (): the last of ``ropes``, or the first where it sees everything."""
    if len(ropes) == 1:
        return ropes[0]
    if isinstance(window, int):
        return ropes[0] if window == EVERYTHING else ropes[-1]
    cos, sin = (jnp.where(window == EVERYTHING, full, local) for full, local in zip(*ropes, strict=True))
    return cos, sin


def run_stages(
    config: LlavaConfig,
    stages: Params,
    plan: Sequence[Stage],
    buffer: TokenBuffer,
    image_sizes: Sequence[int],
    *,
    first: int = 0,
    past: DecodeState | None = None,
    max_positions: int | None = None,
    new_slots: int | None = None,
    implementation: Implementation = "auto",
    remat: Remat = "none",
    keep_hidden: bool = False,
) -> DecoderOutput:
    """Runs the stages of ``plan`` from ``first`` on over ``buffer``, dropping at each boundary.

    Args:
      stages: parameters, one entry for each stage of ``plan``.
      buffer: the output of the stage before ``first``, before the drop between them.
      image_sizes: largest token count of each image of a row; empty means that nothing can be dropped.
      past: caches that hold earlier tokens, with room for the buffer's. A stage drops by its scores among the tokens
        in its cache and the buffer, as if it saw all of them.
      max_positions: static, rope tables are made for so many positions; None is the buffer's slots, and with ``past``
        no table at all, for a single token.
      new_slots: without ``past``, returns a cache for each stage with so many slots for tokens to come.
      implementation: of the attention without ``past``; with it, it is that of caches, which has one.
      remat: what a layer keeps for its gradient.
      keep_hidden: also returns the input of each layer.
    """
    score, text = find_score(config), config.text
    if text.by_slots and past is None:
        check_masks(implementation)
    follow = score.last_layer and bool(image_sizes)
    drops, caches, lengths, layer_inputs = [], [], [], []
    index: list[jax.Array] = []
    last_layer = last_input = first_output = None
    delta = rope_delta_of(buffer, past)
    if max_positions is None and past is None:
        max_positions = buffer.slots
    if text.mrope_sections:
        max_positions = None  # the positions of a video are not bounded by its tokens
    bases = (False, True) if text.local_rope_theta else (False,)  # of all layers, or without and with a window
    tables = max_positions and [rope_tables(text, jnp.arange(max_positions)[None], local) for local in bases]
    rings = None if past is None else past.rings
    single = past is not None and rings is None and buffer.slots == 1

    def ropes_at(positions: jax.Array) -> list[Rope]:
        if tables:
            ropes = [rope_at(table, positions) for table in tables]
        else:
            ropes = [rope_tables(text, positions, local) for local in bases]
        # Heads are cut along tensor, so all of them need the angles of all rows: else each layer would gather them.
        return jax.tree.map(lambda x: constrain(x, "batch", None, None), ropes)

    def ropes_of(buffer: TokenBuffer, s: int, dropped: bool) -> list[Rope]:
        before: Any = (0, 0)
        if past is not None:
            before = (past.lengths[s], past.lengths[0] + (0 if past.rope_delta is None else past.rope_delta))
        return ropes_at(positions_of(config.schedule, buffer, *before, dropped=dropped))

    def places_of(buffer: TokenBuffer, s: int) -> tuple[Places, Places] | tuple[None, None]:
        if not text.by_slots and rings is None:
            return None, None
        group = buffer.image_id if text.two_way_images else jnp.zeros_like(buffer.image_id)
        if past is not None and rings is not None:
            slot = past.lengths[s][:, None] + jnp.arange(buffer.slots)
            index = buffer.index + past.lengths[0][:, None] if text.by_slots else slot
            return Places(slot, index, group), rings[s].places
        if past is None:
            return stage_places(buffer.index, group, jnp.int32(0), jnp.int32(0), None)
        assert past.index is not None
        return stage_places(buffer.index, group, past.lengths[s], past.lengths[0], past.index[s])

    for s, stage in enumerate(plan[first:], first):
        layers, cache = stages[str(s)], None if past is None else past.caches[s]
        write_behind = single and not isinstance(layers, list)
        start = jnp.int32(0) if past is None else past.lengths[s]
        if s and image_sizes:
            ropes = ropes_of(buffer, s, dropped=s > (past is None))  # among cached tokens, numbered as they are
            query, key = places_of(buffer, s)
            cached = None if cache is None else restored(cache.layer(0)[0], buffer.hidden.dtype)
            if rings is not None and cached is not None:
                window = text.window_of(stage.start) or EVERYTHING
                cached = rotate_cached(cached, rope_in(window, ropes_at(rings[s].positions)))
            at = Boundary(
                config=config,
                number=s - 1,
                buffer=buffer,
                rope=rope_in(text.window_of(stage.start) or EVERYTHING, ropes),
                next_layer=layer_of(layers, 0),
                places=query,
                past=None if cached is None else Past(cached, start, key),
                last_layer=last_layer,
                last_rope=rope_in(text.window_of(stage.start - 1) or EVERYTHING, ropes),
                last_input=last_input,
            )
            buffer, dropped = drop(stage, at, score.rank, max(image_sizes))
            drops.append(dropped)
        ropes = ropes_of(buffer, s, dropped=s > 0)
        query, key = places_of(buffer, s)
        key_ropes = None
        if rings is not None and query is not None:
            key, old = rings[s].places_with(query), ropes_at(rings[s].positions)
            key_ropes = [jax.tree.map(rings[s].write, *pair) for pair in zip(old, ropes, strict=True)]
        of_stage = ropes, key_ropes, query, key, layer_windows(text, stage), start

        def body(
            carry: Any,
            params: Params,
            n: Any,
            buffer: TokenBuffer = buffer,
            of_stage: Any = of_stage,
            first_layer: int = stage.start,
            ring: Ring | None = None if rings is None else rings[s],
            before: StageCache | None = cache if write_behind else None,
        ) -> Any:
            x, cache, _ = carry
            ropes, key_ropes, query, key, windows, start = of_stage
            rope = rope_in(windows[n], ropes)

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, StageCache | None]:
                window, stored = text.sliding_window, (as_cached(k, text.cache_dtype), as_cached(v, text.cache_dtype))
                if ring is not None:
                    written = write_slots(cache, n, *stored, ring.slots)
                    keys, values = written.layer(n)
                    keys = rotate_cached(restored(keys, q.dtype), rope_in(windows[n], key_ropes))
                    return attend_places(rotate(q, rope), keys, values, query, key, windows[n]), written
                if single:
                    own = None if before is None else StageCache(*stored)
                    held = write_tokens(cache, n, *stored, start) if before is None else before
                    seen = (
                        sees(query, key, windows[n])[:, 0] if text.by_slots else seen_slots(start, held.slots, window)
                    )
                    return attend_token(q, held, n, start, seen, own), held if own is None else own
                if cache is not None:
                    written = write_tokens(cache, n, *stored, start)
                    cached = written.layer(n)
                    if text.by_slots:
                        return attend_places(q, *cached, query, key, windows[n]), written
                    return attend_cache(q, *cached, start, window), written
                k, v = (restored(x, q.dtype) for x in stored)
                if text.by_slots:
                    out = attend_places(q, k.swapaxes(1, 2), v.swapaxes(1, 2), query, key, windows[n])
                else:
                    out = attention(
                        q, k, v, causal=True, length=buffer.length, window=window, implementation=implementation
                    )
                return out, None if new_slots is None else cache_prompt(*stored, new_slots)

            out, new = decoder_layer(text, params, x, rope if ring is None else None, attend)
            if buffer.additions is not None:
                out = add_behind(out, buffer.additions, first_layer + n)
            carried, stacked = (new, None) if cache is not None else (None, new)
            return (out, carried, x if follow else None), (stacked, x if keep_hidden else None)

        begin = (buffer.hidden, None if write_behind else cache, buffer.hidden if follow else None)
        (x, written, last_input), outputs = scan_layers(rematerialise(body, remat), begin, layers)
        new, inputs = outputs or (None, None)  # keys and values that the layers return; a stage may have no layers
        if write_behind and cache is not None and new is not None:
            written = write_in_all_layers(cache, new, start)
        last_layer = layer_of(layers, -1) if follow and stage.num_layers else None
        left = None if stage.stop >= config.additions else buffer.additions
        buffer = dataclasses.replace(buffer, hidden=x, additions=left)
        first_output = buffer if first_output is None else first_output
        caches.append(new if past is None else written)
        lengths.append(buffer.length + start)
        if key is not None and rings is None and (past is not None or new_slots is not None):
            index.append(jnp.pad(key.index, [(0, 0), (0, new_slots or 0)]))
        layer_inputs.append(inputs)
    state = DecodeState(tuple(caches), tuple(lengths), delta, tuple(index) if index else None)
    return DecoderOutput(buffer, state, tuple(drops), tuple(layer_inputs), first_output)


def add_behind(x: jax.Array, additions: jax.Array, layer: jax.Array | int) -> jax.Array:
    """``x`` (B, S, D), the output of the model's layer number ``layer``, with its additions (B, S, A, D) if it has any.

    One program for the layers of a stack: those behind the first A read nothing.
    """
    A = additions.shape[2]
    at = jnp.minimum(jnp.asarray(layer), A - 1)
    return jax.lax.cond(
        jnp.asarray(layer) < A,
        lambda x: x + jax.lax.dynamic_index_in_dim(additions, at, axis=2, keepdims=False),
        lambda x: x,
        x,
    )


def run_token(
    config: LlavaConfig, stages: Params, x: jax.Array, state: DecodeState, step: jax.Array
) -> tuple[jax.Array, DecodeState]:
    """One new token of each row through all layers; nothing is dropped.

    Args:
      x: (B, 1, D), embeddings of the tokens.
      state: of the prefill.
      step: () or (B,) int32, tokens decoded before this one. It goes to slot ``state.lengths[s] + step`` of stage s.

    Returns:
      ((B, 1, D), the state with this token in its caches and the lengths of the prefill).
    """
    B = x.shape[0]
    zero, one = jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32)
    positions = jnp.zeros((B, 1, 3), jnp.int32) if config.text.mrope_sections else None
    token = TokenBuffer(
        x, image_id=zero, index=zero, length=one, query_rows=zero, image_count=zero, positions=positions
    )
    past = dataclasses.replace(state, lengths=tuple(length + step for length in state.lengths))
    plan = config.schedule.plan(config.text.num_layers, Bucket(text=1))
    output = run_stages(config, stages, plan, token, (), past=past)
    return output.buffer.hidden, dataclasses.replace(state, caches=output.state.caches, index=output.state.index)
