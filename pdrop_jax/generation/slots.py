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
from pdrop_jax.generation.logprobs import no_logprobs
from pdrop_jax.generation.next_token import TokenSampler
from pdrop_jax.generation.pools import Prefixes, images_of, insert, recall, remember
from pdrop_jax.model.attention import aligned
from pdrop_jax.model.cache import empty_caches, grow
from pdrop_jax.model.decoder import DecodeState
from pdrop_jax.model.drop import DropRecord
from pdrop_jax.model.multi_turn import rerank
from pdrop_jax.model.params import Params
from pdrop_jax.model.quantization import stored_bytes
from pdrop_jax.model.vlm import ImageEmbeddings, next_logits, run_prompts


@dataclasses.dataclass(frozen=True)
class SlotShape:
    """The static shape of a slot.

    Attributes:
      capacity: largest number of new tokens.
      sizes: for each stage C_s, the tokens that its cache holds: those of a prompt of the largest bucket, and the new.
      top_logprobs: number of most likely tokens that are recorded for each new token; 0 records nothing.
    """

    capacity: int
    sizes: tuple[int, ...]
    top_logprobs: int = 0


def slot_shape(
    config: LlavaConfig,
    buckets: Sequence[Bucket],
    max_new_tokens: int,
    implementation: Implementation = "auto",
    top_logprobs: int = 0,
) -> SlotShape:
    """The shape of a slot for prompts of any of ``buckets``."""
    plans = [config.schedule.plan(config.text.num_layers, bucket, aligned(implementation)) for bucket in buckets]
    largest = (max(stage.slots for stage in stages) for stages in zip(*plans, strict=True))
    return SlotShape(max_new_tokens, tuple(size + max_new_tokens for size in largest), top_logprobs)


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
            logprobs=no_logprobs(slots, shape.capacity, shape.top_logprobs),
        )
    )


# Slots that are all free.
empty_slots = jax.jit(_empty, static_argnums=(0, 1, 2, 3))


@functools.partial(
    jax.jit,
    static_argnames=("config", "implementation"),
    donate_argnames=("state", "prefixes"),
    compiler_options=ROUNDED,
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
    allowed: jax.Array | None = None,
    images: tuple[ImageEmbeddings, jax.Array] | None = None,
    prefixes: Prefixes | None = None,
    entries: jax.Array | None = None,
    *,
    implementation: Implementation = "auto",
) -> tuple[State, Prefixes | None, tuple[jax.Array, ...], tuple[DropRecord, ...]]:
    """Prefills the rows of ``batch`` and puts them, with their first new tokens, into slots.

    Consumes ``state`` and ``prefixes``.

    Args:
      slots: (R,) int32, the slot of each row of the batch. Rows that repeat another one, slot included, are padding.
      seeds: (R,) uint32.
      sampler: of the batch's rows, see ``next_token.rows_sampler``.
      allowed: of the batch's rows, see ``next_token.only``.
      images: a pool and the entries (R, M) int32 of the batch's images; None computes them from its crops.
      prefixes, entries: a pool, and the entries (R,) int32 that the first stage of each row is written to.

    Returns:
      (state, prefixes, lengths of the prompts in each stage (R,) int32, drop records).
    """
    shown = None if images is None else images_of(*images, jnp.asarray(batch.image_id))
    output = run_prompts(config, params, batch, 0, images=shown, implementation=implementation)
    if prefixes is not None and entries is not None:
        prefixes = remember(prefixes, entries, output)
    logits = next_logits(config, params, output.buffer)
    state = _enter(state, logits, output.state, slots, seeds, sampler, stop_ids, allowed)
    return state, prefixes, output.state.lengths, output.drops


@functools.partial(
    jax.jit, static_argnames=("config", "implementation"), donate_argnames=("state",), compiler_options=ROUNDED
)
def admit_after(
    config: LlavaConfig,
    params: Params,
    state: State,
    batch: Batch,
    slots: jax.Array,
    seeds: jax.Array,
    sampler: TokenSampler,
    stop_ids: jax.Array,
    allowed: jax.Array | None,
    prefixes: Prefixes,
    entries: jax.Array,
    first: jax.Array,
    rest: Batch,
    *,
    implementation: Implementation = "auto",
) -> tuple[State, tuple[jax.Array, ...], tuple[DropRecord, ...]]:
    """``admit`` for prompts that begin with a prefix: only what is behind it runs through the first stage.

    The result is that of ``admit`` up to float rounding, see ``multi_turn.rerank``.

    Args:
      prefixes, entries: a pool, and the entry of each row, (R,) int32.
      first: (R,) int32, tokens of the prefix.
      rest: the tokens behind it, text alone.
    """
    cache, output = recall(prefixes, entries, batch.bucket.slots)
    logits, model, _, drops = rerank(
        config, params, rest, batch, cache, first, output, 0, implementation=implementation
    )
    return _enter(state, logits, model, slots, seeds, sampler, stop_ids, allowed), model.lengths, drops


def _enter(
    state: State,
    logits: jax.Array,
    model: DecodeState,
    slots: jax.Array,
    seeds: jax.Array,
    sampler: TokenSampler,
    stop_ids: jax.Array,
    allowed: jax.Array | None,
) -> State:
    keys = jax.vmap(jax.random.key)(seeds)
    most = 0 if state.logprobs is None else state.logprobs.ids.shape[2]
    new = first_token(logits, model, state.tokens.shape[1], keys, sampler, stop_ids, allowed, most)
    return insert(slots, state, new)
