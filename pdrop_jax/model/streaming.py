"""Watching a stream of frames, and answering questions about it at any time.

``begin``, then ``watch`` for each frame and ``answer`` for each question. All shapes are static. A state that is
donated to ``watch`` is updated in place; ``answer`` leaves it as it is.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pdrop_jax.batch import Batch, Bucket
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.model.cache import KeysOrValues, StageCache, as_cached, empty_caches, grow, restored
from pdrop_jax.model.decoder import DecoderOutput, DecodeState, layer_windows, rope_in, run_stages
from pdrop_jax.model.drop import Boundary, DropRecord, TokenBuffer
from pdrop_jax.model.layers import layer_of
from pdrop_jax.model.multi_turn import keep, run_later
from pdrop_jax.model.params import Params
from pdrop_jax.model.ring import (
    Layout,
    held,
    next_position,
    original_positions,
    original_slots,
    ring_of,
    rope_positions,
    shifted_slots,
)
from pdrop_jax.model.rope import Rope, rope_tables, rotate_cached
from pdrop_jax.model.scores import find_score
from pdrop_jax.model.slot_attention import EVERYTHING, Ring
from pdrop_jax.model.standby import Block, empty_block
from pdrop_jax.model.vlm import embed, embed_images


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StreamState:
    """What is kept of a stream. S stages, one of them if every question ranks the tokens anew.

    Attributes:
      caches: for each stage, keys without rotation; see ``ring`` for the slots. None for a stage without layers.
      tokens: for each stage (C_s,) int32, which token of its frame a slot holds, or which of the prefix.
      rank: (W, n) int32, for each slot of the window, the order in which the bank takes the tokens of its frame.
      frames: () int32, frames so far.
      hidden: (1, C_0, D), the first stage's output if only that is kept; otherwise None.
      block: what the standby tokens of the next frame see over time; None without standby tokens.
    """

    caches: tuple[StageCache | None, ...]
    tokens: tuple[jax.Array, ...]
    rank: jax.Array
    frames: jax.Array
    hidden: jax.Array | None = None
    block: Block | None = None


def begin(
    config: LlavaConfig, params: Params, layout: Layout, prefix: Batch, offsets: jax.Array, keeps_images: bool
) -> StreamState:
    """The state before the first frame, with the text in front of the frames.

    Args:
      prefix: one row of ``layout.prefix`` text tokens, without images.
      offsets: see ``ring.original_positions``.
      keeps_images: frames run through all stages and drop by the standing question (mode "keep"); otherwise only
        through the first (mode "rerank").
    """
    plan = config.schedule.plan(config.text.num_layers, Bucket(layout.prefix))[: None if keeps_images else 1]
    counts = layout.counts(config)[: len(plan)]
    slots = [layout.most(*count) + layout.text for count in counts]
    buffer = embed(config, params, prefix, layout.prefix)
    empty = empty_caches(config, 1, buffer.hidden.dtype)[: len(plan)]
    caches = tuple(cache and grow(cache, size) for cache, size in zip(empty, slots, strict=True))
    tokens = tuple(jnp.where(jnp.arange(size) < layout.prefix, jnp.arange(size), 0) for size in slots)
    hidden = None if keeps_images else jnp.zeros((1, slots[0], config.text.hidden_size), buffer.hidden.dtype)
    rings = tuple(
        Ring(
            slots=jnp.arange(layout.prefix)[None],
            order=jnp.full((1, size), EVERYTHING),
            index=jnp.zeros((1, size), jnp.int32),
            positions=jnp.zeros((1, size, *offsets.shape[1:]), jnp.int32),
        )
        for size in slots
    )
    zero = jnp.zeros(1, jnp.int32)
    past = DecodeState(caches, (zero,) * len(plan), zero, rings=rings)
    output = run_stages(config, params["stages"], plan, buffer, (), past=past)
    if hidden is not None:
        hidden = hidden.at[:, : layout.prefix].set(output.buffer.hidden)
    rank = jnp.zeros((layout.window, layout.frame), jnp.int32)
    block = None
    if config.standby:
        block = empty_block(config, params["standby"]["temporal"]["attention"]["k"]["kernel"].dtype)
    return StreamState(output.state.caches, tokens, rank, jnp.int32(0), hidden, block)


def watch(
    config: LlavaConfig, params: Params, layout: Layout, state: StreamState, frame: Batch, offsets: jax.Array
) -> StreamState:
    """``state`` with one more frame; the frame that leaves the window goes to the bank first.

    Args:
      frame: one row, the frame and behind it the standing question, in ``layout.plan``'s bucket without padding.
    """
    keeps_images = state.hidden is None
    plan = layout.plan(config)[: None if keeps_images else 1]
    number = state.frames
    state = _detach(config, layout, state)
    block = state.block
    if config.standby and block:
        block = dataclasses.replace(block, at=number % config.standby.frames)
    images = embed_images(config, params, frame, block=block)
    buffer = embed(config, params, frame, plan[0].slots, images=images)
    output = run_stages(
        config,
        params["stages"],
        plan,
        buffer,
        (layout.frame - layout.standby,),
        past=_past(config, layout, state, offsets, number),
        max_positions=layout.positions(config) + layout.text,
    )
    scores = (
        _first_scores(config, params, output, layout.frame) if not keeps_images and config.schedule.layers else None
    )
    rank = _rank(layout, output, scores)
    kept = [jnp.arange(layout.frame + layout.text)]
    for drop, stage in zip(output.drops, plan[1:], strict=True):
        kept.append(drop.index[0][jnp.flatnonzero(drop.keep[0], size=stage.slots)])
    tokens, hidden = [], state.hidden
    for s, (old, own) in enumerate(zip(state.tokens, kept, strict=True)):
        tokens.append(old.at[layout.slots(s, config, number)].set(own))
    if hidden is not None:
        hidden = hidden.at[:, layout.slots(0, config, number)].set(output.buffer.hidden)
    rank = state.rank.at[number % layout.window].set(rank)
    return StreamState(output.state.caches, tuple(tokens), rank, number + 1, hidden, images.block)


def _past(
    config: LlavaConfig, layout: Layout, state: StreamState, offsets: jax.Array, number: jax.Array
) -> DecodeState:
    found = [ring_of(config, layout, s, number, x, offsets) for s, x in enumerate(state.tokens)]
    rings, lengths = zip(*found, strict=True)
    now = held(layout, *layout.counts(config)[0], number + 1)
    delta = next_position(layout, now) - layout.extent - lengths[0]
    return DecodeState(state.caches, lengths, delta, rings=rings)


def _detach(config: LlavaConfig, layout: Layout, state: StreamState) -> StreamState:
    """Copies what the bank takes of the frame that leaves the window, if one does, into the bank's next slot."""
    W, R, P = layout.window, layout.bank, layout.prefix
    leaves, old = state.frames >= W, state.frames % W  # its slot is the next frame's
    to = jnp.maximum(state.frames - W, 0) % R
    caches, tokens, hidden = [], [], state.hidden
    for s, (n, b) in enumerate(layout.counts(config)[: len(state.tokens)]):
        start, target = P + R * b + old * n, P + to * b
        own = jax.lax.dynamic_slice_in_dim(state.tokens[s], start, n)
        best = jnp.sort(jnp.argsort(state.rank[old][own])[:b]) + start  # in their own order

        def moved(x: jax.Array, axis: int, b: int = b, best: jax.Array = best, target: jax.Array = target) -> jax.Array:
            before = jax.lax.dynamic_slice_in_dim(x, target, b, axis)
            new = jnp.where(leaves, jnp.take(x, best, axis=axis), before)
            return jax.lax.dynamic_update_slice_in_dim(x, new, target, axis)

        cache = state.caches[s]
        caches.append(jax.tree.map(functools.partial(moved, axis=3), cache))
        tokens.append(moved(state.tokens[s], 0))
        if hidden is not None:
            hidden = moved(hidden, 1)
    return dataclasses.replace(state, caches=tuple(caches), tokens=tuple(tokens), hidden=hidden)


def _rank(layout: Layout, output: DecoderOutput, scores: jax.Array | None) -> jax.Array:
    """The order (n,) int32 in which the bank takes a frame's tokens.

    Standby tokens come first. Then those that the drops kept longest, among them those with the largest score at the
    last drop that they took part in. Where nothing was dropped: those with the largest ``scores`` (n,) or else norm.
    """
    n = layout.frame
    survived = jnp.where(jnp.arange(n) >= n - layout.standby, len(output.drops) + 1, 0)
    last = jnp.zeros(n)
    if not output.drops:
        last = jnp.linalg.norm(output.buffer.hidden[0, :n].astype(jnp.float32), axis=-1) if scores is None else scores
    for drop in output.drops:
        index = jnp.where(drop.image_id[0] > 0, drop.index[0], n)
        survived = survived.at[jnp.where(drop.keep[0], index, n)].add(1, mode="drop")
        last = last.at[index].set(drop.scores[0], mode="drop")
    return jnp.argsort(jnp.lexsort((-last, -survived))).astype(jnp.int32)


def _first_scores(config: LlavaConfig, params: Params, output: DecoderOutput, n: int) -> jax.Array:
    """(n,) float32, the schedule's score at the first drop, among a frame's tokens and the standing question alone."""
    buffer = output.buffer
    positions = jnp.arange(buffer.slots)[None] if buffer.positions is None else buffer.positions
    at = Boundary(
        config=config,
        number=0,
        buffer=buffer,
        rope=rope_tables(config.text, positions),
        next_layer=layer_of(params["stages"]["1"], 0),
    )
    return jax.lax.stop_gradient(find_score(config).rank(at))[0, :n]


def answer(
    config: LlavaConfig,
    params: Params,
    layout: Layout,
    state: StreamState,
    chunk: Batch,
    offsets: jax.Array,
    new_slots: int,
    *,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, DecodeState, tuple[DropRecord, ...]]:
    """Runs a question about what is held: as if it were a prompt, without running the frames again.

    Args:
      chunk: one row, the text behind the frames.
      new_slots: cache slots for tokens to come.

    Returns:
      (logits (1, V) float32 after the question, state for ``vlm.decode_step``, drops: none of them if ``watch`` has
      made them).
    """
    T = chunk.bucket.slots
    past, order = _recall(config, layout, state, offsets, T + new_slots)
    most = layout.positions(config) + T
    if state.hidden is None:
        logits, after, _ = keep(config, params, chunk, past, most, implementation=implementation)
        return logits, after, ()
    plan = config.schedule.plan(config.text.num_layers, chunk.bucket)[:1]
    new = run_stages(config, params["stages"], plan, embed(config, params, chunk, T), (), past=past, max_positions=most)
    whole = _whole(layout, state, chunk, new.buffer, order, offsets)
    sizes = (layout.frame - layout.standby,) * (layout.bank + layout.window)
    stages = [
        dataclasses.replace(stage, slots=layout.most(*count) + T)
        for stage, count in zip(layout.plan(config), layout.counts(config), strict=True)
    ]
    return run_later(
        config, params, stages, whole, sizes, new.state, new_slots, max_positions=most, implementation=implementation
    )


def _recall(
    config: LlavaConfig, layout: Layout, state: StreamState, offsets: jax.Array, room: int
) -> tuple[DecodeState, jax.Array]:
    """Caches as a prompt of all that is held would leave them, with ``room`` more slots, and the first one's slots."""
    found, plan = layout.counts(config), layout.plan(config)
    first = held(layout, *found[0], state.frames)
    caches: list[StageCache | None] = []
    lengths, index = [], []
    for s, (cache, tokens) in enumerate(zip(state.caches, state.tokens, strict=True)):
        now = held(layout, *found[s], state.frames)
        order = jnp.argsort(now.order)  # what holds nothing is last
        positions = rope_positions(config, layout, s, now, tokens, offsets)[order][None]
        lengths.append(now.length[None])
        index.append(jnp.pad(shifted_slots(layout, first, now, tokens)[order], (0, room))[None])
        if cache is None:
            caches.append(None)
            continue
        bases = (False, True) if config.text.local_rope_theta else (False,)
        ropes = [rope_tables(config.text, positions, local) for local in bases]

        def rotated(k: KeysOrValues, window: jax.Array, ropes: list[Rope] = ropes) -> KeysOrValues:
            turned = rotate_cached(restored(k, jnp.float32), rope_in(window, ropes))
            return as_cached(turned, config.text.cache_dtype)

        kept = jax.tree.map(lambda x, order=order: x[:, :, :, order], cache)
        k = jax.vmap(rotated)(kept.k, layer_windows(config.text, plan[s]))
        caches.append(grow(StageCache(k, kept.v), len(order) + room))
    delta = None
    if config.schedule.positions == "original" or config.text.mrope_sections:
        delta = next_position(layout, first)[None] - lengths[0]
    by_slots = tuple(index) if config.text.by_slots else None
    return DecodeState(tuple(caches), tuple(lengths), delta, by_slots), jnp.argsort(first.order)


def _whole(
    layout: Layout, state: StreamState, chunk: Batch, new: TokenBuffer, order: jax.Array, offsets: jax.Array
) -> TokenBuffer:
    """The first stage's output for all that is held, and behind it for the question, ``new``."""
    assert state.hidden is not None
    n, T = layout.frame, new.slots
    first = held(layout, n, layout.kept, state.frames)
    tokens, size = state.tokens[0], layout.most(n, layout.kept)
    order = order[:size]
    start = first.length

    def joined(old: jax.Array, new: jax.Array) -> jax.Array:
        """(C, ...) in order with (T, ...) behind what is held."""
        padded = jnp.pad(old[order], [(0, T)] + [(0, 0)] * (old.ndim - 1))
        return jax.lax.dynamic_update_slice_in_dim(padded, new.astype(old.dtype), start, 0)[None]

    ranked = (first.frame >= 0) & (tokens < n - layout.standby) & (first.order < EVERYTHING)
    end = jnp.arange(T)
    positions = None
    if new.positions is not None:
        positions = joined(
            original_positions(layout, first, tokens, offsets), new.positions[0] + next_position(layout, first)
        )
    M = layout.bank + layout.window
    length = start + new.length
    return TokenBuffer(
        hidden=joined(state.hidden[0], new.hidden[0]),
        image_id=joined(jnp.where(ranked, first.frame + 1, 0), jnp.zeros_like(end)),
        index=joined(original_slots(layout, first, tokens), layout.prefix + first.frames * n + end),
        length=length,
        query_rows=(length - 1)[:, None],
        image_count=jnp.full((1, M + 1), n - layout.standby),
        positions=positions,
    )
