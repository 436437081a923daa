"""The decoder: a stage is a run over its layers, a stage boundary is a drop.

The ways through it share the layers and differ in what the queries see: ``run_stages`` over whole buffers, with or
without caches (prefill, training), ``run_on_cache`` for tokens behind those that a stage has cached, and ``run_token``
for one such token in all stages (decode).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.attention import Implementation, attend_cache, attention
from pdrop_jax.model.cache import StageCache, cache_prompt, write_tokens
from pdrop_jax.model.drop import TokenBuffer, compact
from pdrop_jax.model.layers import Params, Remat, Rope, layer_of, rematerialise, rope_at, rope_tables, scan_layers
from pdrop_jax.model.lora import bind_layer
from pdrop_jax.model.ranking import choose
from pdrop_jax.model.scores import Boundary, find_score
from pdrop_jax.schedule import DropSchedule, Stage


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Drop:
    """What happened at one stage boundary; all (B, S) over the buffer before the drop.

    Attributes:
      scores: float32, see ``scores``.
      keep: bool.
      image_id: int32, 0 for text and padding.
      index: int32, slot before the first drop.
    """

    scores: jax.Array
    keep: jax.Array
    image_id: jax.Array
    index: jax.Array


def positions_of(schedule: DropSchedule, buffer: TokenBuffer) -> jax.Array:
    """(B, S) int32: renumbered after each drop, or the original slots (``DropSchedule.positions``)."""
    if schedule.positions == "original":
        return buffer.index
    return jnp.broadcast_to(jnp.arange(buffer.slots), buffer.index.shape)


def drop(stage: Stage, at: Boundary, max_count: int) -> tuple[TokenBuffer, Drop]:
    """One stage boundary: score, choose, compact. Returns (buffer of ``stage``, Drop)."""
    buffer = at.buffer
    scores = jax.lax.stop_gradient(find_score(at.config).rank(at))
    keep = choose(buffer, scores, stage.ratio, max_count)
    return compact(buffer, keep, stage.slots), Drop(scores, keep, buffer.image_id, buffer.index)


def run_stages(
    config: LlavaConfig,
    stages: Params,
    plan: Sequence[Stage],
    buffer: TokenBuffer,
    image_sizes: Sequence[int],
    *,
    first: int = 0,
    new_slots: int | None = None,
    implementation: Implementation = "auto",
    remat: Remat = "none",
    keep_hidden: bool = False,
) -> tuple[TokenBuffer, tuple[StageCache | None, ...], tuple[jax.Array, ...], tuple[Drop, ...], list[Any]]:
    """Runs the stages from ``first`` on over ``buffer``, dropping at each boundary.

    Args:
      stages: parameters, one entry for each stage of ``plan``.
      buffer: what left the stage before ``first``, before the drop between them.
      image_sizes: largest token count of each image of a row; empty means that nothing can be dropped.
      new_slots: make a cache for each stage, with so many slots for tokens to come; None makes none.
      remat: what a layer keeps for its gradient.
      keep_hidden: also return each stage's layer inputs (L_s, B, S_s, D).

    Returns:
      (last buffer, caches, valid length (B,) of each stage, drops, layer inputs of each stage).
    """
    drops, caches, lengths, hidden = [], [], [], []
    follows = find_score(config).last_layer and bool(image_sizes)
    last_layer = last_input = None
    tables = rope_tables(config.text, jnp.arange(buffer.slots)[None])
    rope = rope_at(tables, positions_of(config.schedule, buffer))
    for s, stage in enumerate(plan[first:], first):
        layers = stages[str(s)]
        if s and image_sizes:
            at = Boundary(config, s - 1, buffer, rope, first_layer(layers), None, last_layer, last_input)
            buffer, dropped = drop(stage, at, max(image_sizes))
            drops.append(dropped)
            rope = rope_at(tables, positions_of(config.schedule, buffer))
        length = buffer.length

        def body(carry: Any, params: Params, n: Any, rope: Any = rope, length: jax.Array = length) -> tuple[Any, Any]:
            x = carry[0]

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, StageCache | None]:
                window = config.text.sliding_window
                out = attention(q, k, v, causal=True, length=length, window=window, implementation=implementation)
                return out, None if new_slots is None else cache_prompt(k, v, new_slots)

            out, cache = bind_layer(config.text, params)(x, rope, attend)
            return (out, x if follows else None), (cache, x if keep_hidden else None)

        start = (buffer.hidden, buffer.hidden if follows else None)
        (x, last_input), outputs = scan_layers(rematerialise(body, remat), start, layers)
        last_layer = layer_of(layers, -1) if follows and stage.num_layers else None
        cache, inputs = outputs or (None, None)  # a stage may be without layers
        buffer = dataclasses.replace(buffer, hidden=x)
        caches.append(cache)
        lengths.append(length)
        hidden.append(inputs)
    return buffer, tuple(caches), tuple(lengths), tuple(drops), hidden


def run_on_cache(
    config: LlavaConfig,
    layers: Params | list[Params],
    x: jax.Array,
    cache: StageCache | None,
    first: jax.Array,
    rope: Rope,
) -> tuple[jax.Array, StageCache | None]:
    """New tokens of each row through one stage, behind those in its cache.

    Rows of another number of tokens are padded on the right: a token sees none behind it, and what padding leaves in
    the cache is overwritten by the next tokens.

    Args:
      layers: the stage's parameters.
      x: (B, T, D).
      cache: None if the stage has no layers.
      first: (B,) int32, valid slots of the cache; the tokens stand in those behind.
      rope: at the tokens' positions.

    Returns:
      ((B, T, D), cache).
    """

    def body(carry: Any, params: Params, n: Any) -> tuple[Any, None]:
        x, cache = carry

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, StageCache]:
            written = write_tokens(cache, n, k, v, first)
            return attend_cache(q, written.k[n], written.v[n], first, config.text.sliding_window), written

        return bind_layer(config.text, params)(x, rope, attend), None

    return scan_layers(body, (x, cache), layers)[0]


def run_token(
    config: LlavaConfig,
    stages: Params,
    x: jax.Array,
    caches: Sequence[StageCache | None],
    lengths: Sequence[jax.Array],
    step: jax.Array,
) -> tuple[jax.Array, tuple[StageCache | None, ...]]:
    """One new token of each row through all layers; nothing is dropped.

    Args:
      x: (B, 1, D), embeddings of the tokens.
      lengths: valid length (B,) of each stage after the prefill.
      step: () int32, tokens decoded before this one. The token stands in slot ``lengths[s] + step`` of stage s.

    Returns:
      ((B, 1, D), caches).
    """
    filled = []
    for s, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        position = step + (length if config.schedule.positions == "dense" else lengths[0])
        rope = rope_tables(config.text, position[:, None])
        x, cache = run_on_cache(config, stages[str(s)], x, cache, length + step, rope)
        filled.append(cache)
    return x, tuple(filled)


def first_layer(layers: Params | list[Params]) -> Params:
    return layer_of(layers, 0)
