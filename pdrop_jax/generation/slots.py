"""Continuous batching on the device: prompts are prefilled into the free rows of a state, which ``engine.decode`` runs.

A row of the state is called a slot. Each stage has its own cache, and a later stage sees fewer image tokens, so that a
slot takes less memory there. Shapes never change: ``admit`` compiles once for a bucket and a number of prompts, and
``engine.decode`` once.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pdrop_jax.batch import Batch, Bucket
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.generation.engine import ROUNDED, State, first_token, placed
from pdrop_jax.generation.next_token import TokenSampler
from pdrop_jax.model.attention import aligned
from pdrop_jax.model.cache import empty_caches, grow
from pdrop_jax.model.decoder import DecodeState
from pdrop_jax.model.drop import DropRecord
from pdrop_jax.model.params import Params
from pdrop_jax.model.quantization import stored_bytes
from pdrop_jax.model.vlm import prefill


@dataclasses.dataclass(frozen=True)
class SlotShape:
    """The static shape of a slot.

    Attributes:
      capacity: largest number of new tokens.
      sizes: for each stage C_s, the tokens that its cache holds: those of a prompt of the largest bucket, and the new.
    """

    capacity: int
    sizes: tuple[int, ...]


def slot_shape(
    config: LlavaConfig, buckets: Sequence[Bucket], max_new_tokens: int, implementation: Implementation = "auto"
) -> SlotShape:
    """The shape of a slot for prompts of any of ``buckets``."""
    plans = [config.schedule.plan(config.text.num_layers, bucket, aligned(implementation)) for bucket in buckets]
    largest = (max(stage.slots for stage in stages) for stages in zip(*plans, strict=True))
    return SlotShape(max_new_tokens, tuple(size + max_new_tokens for size in largest))


def slot_bytes(config: LlavaConfig, shape: SlotShape, dtype: DTypeLike, slots: int = 1) -> int:
    """Bytes of device memory that so many slots take, most of them keys and values of ``dtype``.

    Example, LLaVA-1.5-7B in bfloat16, one picture, 64 text tokens and 128 new ones::

        config, bucket = LlavaConfig.llava_1_5_7b(), Bucket(64, (576,))
        slot_bytes(config, slot_shape(config, [bucket], 128), jnp.bfloat16)
    """
    state = jax.eval_shape(functools.partial(_empty, config, slots, shape, dtype))
    return stored_bytes(state)


def _empty(config: LlavaConfig, slots: int, shape: SlotShape, dtype: DTypeLike) -> State:
    caches = empty_caches(config, slots, dtype)
    caches = tuple(cache and grow(cache, size) for cache, size in zip(caches, shape.sizes, strict=True))
    zeros, text = jnp.zeros(slots, jnp.int32), config.text
    model = DecodeState(
        caches=caches,
        lengths=(zeros,) * len(caches),
        rope_delta=zeros if text.mrope_sections else None,
        index=tuple(jnp.zeros((slots, size), jnp.int32) for size in shape.sizes) if text.by_slots else None,
    )
    return placed(
        State(
            tokens=jnp.zeros((slots, shape.capacity), jnp.int32),
            step=zeros + 1,  # a free slot runs along as if it had one token
            done=jnp.ones(slots, bool),
            key=jax.vmap(jax.random.key)(jnp.zeros(slots, jnp.uint32)),
            model=model,
        )
    )


# Slots that are all free.
empty_slots = jax.jit(_empty, static_argnums=(0, 1, 2, 3))


@functools.partial(
    jax.jit, static_argnames=("config", "implementation"), donate_argnames=("state",), compiler_options=ROUNDED
)
def admit(
    config: LlavaConfig,
    params: Params,
    state: State,
    batch: Batch,
    slots: jax.Array,
    seeds: jax.Array,
    sampler: TokenSampler,
    stop_ids: jax.Array,
    *,
    implementation: Implementation = "auto",
) -> tuple[State, tuple[jax.Array, ...], tuple[DropRecord, ...]]:
    """Prefills the rows of ``batch`` and puts them, with their first new tokens, into slots. Consumes ``state``.

    Args:
      slots: (R,) int32, the slot of each row of the batch. Rows that repeat another one, slot included, are padding.
      seeds: (R,) uint32.
      sampler: of the batch's rows, see ``next_token.rows_sampler``.

    Returns:
      (state, lengths of the prompts in each stage (R,) int32, drop records).
    """
    logits, model, drops = prefill(config, params, batch, 0, implementation=implementation)
    keys = jax.vmap(jax.random.key)(seeds)
    new = first_token(logits, model, state.tokens.shape[1], keys, sampler, stop_ids)
    return placed(jax.tree.map(functools.partial(_insert, slots), state, new)), model.lengths, drops


def _insert(slots: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """``old`` with the rows of ``new``, padded with zeros to its size, in ``slots``.

    All of a slot is overwritten: what an earlier answer left there may be no number, and would be one of the products
    in which the mask's zeros are factors.
    """
    axis = 1 if old.ndim > 3 else 0  # caches have layers in front
    sizes = [(0, 0 if n == axis else a - b) for n, (a, b) in enumerate(zip(old.shape, new.shape, strict=True))]
    if any(after for _, after in sizes):
        new = jnp.pad(new, sizes)
    for r in range(new.shape[axis]):  # an update of one row needs no copy, wherever it is
        row = jax.lax.slice_in_dim(new, r, r + 1, axis=axis)
        old = jax.lax.dynamic_update_slice_in_dim(old, row, slots[r], axis)
    return old
