"""What a conversation keeps on the device between two turns: KV caches, and hidden states of the first stage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.model.attention import aligned
from pdrop_jax.model.cache import empty_caches, grow
from pdrop_jax.model.decoder import DecodeState
from pdrop_jax.model.multi_turn import FirstStage, empty_first_stage


@dataclasses.dataclass(frozen=True)
class Past:
    """What a turn leaves for the next one.

    Attributes:
      ids: the tokens that are cached; IMAGE_PLACEHOLDER stands for an image.
      asked: number of tokens in the last prompt.
      model: caches of all stages, or of the first one only; lengths of the last prompt.
      first: output of the first stage, or None.
      kept: see ``Answer``.
    """

    ids: list[int]
    asked: int
    model: DecodeState
    first: FirstStage | None
    kept: list[list[list[int]]]


@functools.partial(jax.jit, static_argnames=("sizes", "width"))
def _grown(
    state: DecodeState, first: FirstStage | None, sizes: tuple[int, ...], width: int
) -> tuple[DecodeState, FirstStage | None]:
    def pad(x: jax.Array, size: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, max(0, size - x.shape[1]))] + [(0, 0)] * (x.ndim - 2))

    caches = tuple(cache and grow(cache, size) for cache, size in zip(state.caches, sizes, strict=False))
    index = state.index
    if index is not None:
        index = tuple(pad(x, size) for x, size in zip(index, sizes, strict=False))
    state = dataclasses.replace(state, caches=caches, index=index)
    return state, jax.tree.map(lambda x: pad(x, width), first)


def with_room(past: Past, config: LlavaConfig, whole: Batch, capacity: int) -> tuple[DecodeState, FirstStage | None]:
    """Caches with slots for the conversation and ``capacity`` new tokens, hidden states for the conversation."""
    state, first = past.model, past.first
    plan = config.schedule.plan(config.text.num_layers, whole.bucket, aligned("auto"))
    found = tuple(0 if cache is None else cache.slots for cache in state.caches)
    sizes = tuple(max(n, stage.slots + capacity) for n, stage in zip(found, plan, strict=False))
    width = 0 if first is None else max(first.slots, whole.bucket.slots)
    if found != sizes or (first is not None and first.slots != width):
        return _grown(state, first, sizes, width)
    return state, first


def empty_past(model: Model, keeps_images: bool) -> Past:
    """The past of the first turn; ``keeps_images`` is mode "keep"."""
    config, dtype = model.config, model.dtype
    caches = empty_caches(config, 1, dtype)
    lengths = tuple(jnp.zeros(1, jnp.int32) for _ in caches)
    delta = jnp.zeros(1, jnp.int32) if config.text.mrope_sections else None
    index = tuple(jnp.zeros((1, 0), jnp.int32) for _ in caches) if config.text.by_slots else None
    if keeps_images:
        return Past([], 0, DecodeState(caches, lengths, delta, index), None, [])
    first = empty_first_stage(config, 1, 0, dtype)
    return Past([], 0, DecodeState(caches[:1], lengths, delta, index and index[:1]), first, [])
