"""The next question of a conversation on the cache of those before it: two ways, see ``keep`` and ``rerank``.

Both take a ``chunk``: the batch of the tokens that are not cached yet, with the images among them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.attention import Implementation, aligned
from pdrop_jax.model.cache import StageCache
from pdrop_jax.model.decoder import Drop, drop, first_layer, run_on_cache, run_stages
from pdrop_jax.model.drop import TokenBuffer
from pdrop_jax.model.layers import Params, Rope, rope_at, rope_tables
from pdrop_jax.model.scores import Boundary
from pdrop_jax.model.vlm import DecodeState, buffer_of, embed, next_logits


def keep(
    config: LlavaConfig,
    params: Params,
    chunk: Batch,
    state: DecodeState,
    slots: int,
    *,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, DecodeState, tuple[Drop, ...]]:
    """Image tokens that stayed for the questions before stay for this one, those that went are gone.

    The chunk runs through all stages on their caches. Images in it are dropped at the boundaries by the chunk's own
    query row, which is ranked among what the next stage has cached and the chunk, as if that stage saw all of it. On
    empty caches this is ``vlm.prefill``.

    Args:
      state: caches with a slot for every token of the chunk, and how many of their slots are in use.
      slots: static, the conversation up to the end of the chunk has no more tokens.
      implementation: of the vision tower's attention; that of the decoder's is ``attention.attend_cache``.

    Returns:
      (logits (B, V) float32 after the chunk, state for ``vlm.decode_step``, drops over the chunk's buffers).
    """
    plan = config.schedule.plan(config.text.num_layers, chunk.bucket)
    buffer = embed(config, params, chunk, plan[0].slots, implementation)
    tables = rope_tables(config.text, jnp.arange(slots)[None])
    caches, lengths, drops = [], [], []
    for s, (stage, cache, first) in enumerate(zip(plan, state.caches, state.lengths, strict=True)):
        layers = params["stages"][str(s)]
        if s and chunk.bucket.images and cache is not None:  # no stage but the first is without layers
            rope = _rope_behind(config, tables, buffer, first, state.lengths[0])
            at = Boundary(config, s - 1, buffer, rope, first_layer(layers), past=(cache.k[0], first))
            buffer, dropped = drop(stage, at, max(chunk.bucket.images))
            drops.append(dropped)
        rope = _rope_behind(config, tables, buffer, first, state.lengths[0])
        x, cache = run_on_cache(config, layers, buffer.hidden, cache, first, rope)
        buffer = dataclasses.replace(buffer, hidden=x)
        caches.append(cache)
        lengths.append(first + buffer.length)
    return next_logits(config, params, buffer), DecodeState(tuple(caches), tuple(lengths)), tuple(drops)


def _rope_behind(config: LlavaConfig, tables: Rope, buffer: TokenBuffer, first: jax.Array, start: jax.Array) -> Rope:
    """At the positions of the buffer's tokens behind ``first`` (B,) tokens of a stage, ``start`` (B,) of the first."""
    if config.schedule.positions == "original":
        return rope_at(tables, start[:, None] + buffer.index)
    return rope_at(tables, first[:, None] + jnp.arange(buffer.slots))


def rerank(
    config: LlavaConfig,
    params: Params,
    chunk: Batch,
    whole: Batch,
    cache: StageCache | None,
    first: jax.Array,
    hidden: jax.Array,
    new_slots: int,
    *,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, DecodeState, jax.Array, tuple[Drop, ...]]:
    """The question chooses anew among all image tokens: the same as ``vlm.prefill`` of the whole conversation.

    The first stage drops nothing, so what it computed serves any question: the chunk runs through it on its cache.
    The later stages run again, over all tokens.

    Args:
      whole: the conversation up to the end of the chunk; its crops are not used.
      cache: of the first stage, with a slot for every token of the conversation; None if it has no layers.
      first: (B,) int32, tokens before the chunk.
      hidden: (B, S, D), what left the first stage for the tokens before the chunk; S is ``whole.bucket.slots`` or more.
      new_slots: slots of the later stages' caches for tokens to come.

    Returns:
      (logits (B, V) float32 after the chunk, state for ``vlm.decode_step``, ``hidden`` with the chunk's tokens, drops
      over the buffers of the whole conversation).
    """
    rope = rope_tables(config.text, jnp.arange(hidden.shape[1])[None])
    slots = first[:, None] + jnp.arange(chunk.bucket.slots)  # (B, T)
    x = embed(config, params, chunk, chunk.bucket.slots, implementation).hidden
    x, cache = run_on_cache(config, params["stages"]["0"], x, cache, first, rope_at(rope, slots))
    hidden = hidden.at[jnp.arange(len(slots))[:, None], slots].set(x, mode="drop")

    plan = config.schedule.plan(config.text.num_layers, whole.bucket, aligned(implementation))
    buffer = buffer_of(config, whole, hidden[:, : whole.bucket.slots], plan[0].slots)
    buffer, caches, lengths, drops, _ = run_stages(
        config,
        params["stages"],
        plan,
        buffer,
        whole.bucket.images,
        first=1,
        new_slots=new_slots,
        implementation=implementation,
    )
    state = DecodeState((cache, *caches), (jnp.asarray(whole.length), *lengths))
    return next_logits(config, params, buffer), state, hidden, drops
