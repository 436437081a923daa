"""The next question of a conversation, on the caches of the questions before: two ways, ``keep`` and ``rerank``.

Both take a ``chunk``: the batch of the tokens that are not cached yet, with the images among them.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pdrop_jax.batch import Batch
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.model.attention import aligned
from pdrop_jax.model.cache import StageCache
from pdrop_jax.model.decoder import DecodeState, run_stages
from pdrop_jax.model.drop import DropRecord, TokenBuffer
from pdrop_jax.model.params import Params
from pdrop_jax.model.vlm import buffer_of, embed, next_logits
from pdrop_jax.schedule import Stage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FirstStage:
    """What ``rerank`` keeps of the tokens so far.

    Attributes:
      hidden: (B, S, D), the first stage's output.
      additions: (B, S, A, D), see ``TokenBuffer``; None if the first stage has used them up.
    """

    hidden: jax.Array
    additions: jax.Array | None = None

    @property
    def slots(self) -> int:
        return self.hidden.shape[1]


def empty_first_stage(config: LlavaConfig, rows: int, slots: int, dtype: DTypeLike) -> FirstStage:
    """All zeros; with additions only if the first drop comes before everything is added."""
    A, D, drops = config.additions, config.text.hidden_size, config.schedule.layers
    additions = jnp.zeros((rows, slots, A, D), dtype) if drops and drops[0] < A else None
    return FirstStage(jnp.zeros((rows, slots, D), dtype), additions)


def keep(
    config: LlavaConfig,
    params: Params,
    chunk: Batch,
    state: DecodeState,
    slots: int,
    *,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, DecodeState, tuple[DropRecord, ...]]:
    """Image tokens that earlier questions kept stay for this one, those that they dropped are gone.

    The chunk runs through all stages on their caches. Images in it are dropped at the boundaries by the chunk's own
    query row, which is ranked among what the next stage has cached and the chunk, as if that stage saw all of it. On
    empty caches this is ``vlm.prefill``.

    Args:
      state: caches with a slot for every token of the chunk, and how many of their slots are in use.
      slots: static, the conversation up to the end of the chunk has no more tokens.
      implementation: of the vision tower's attention; the decoder's is ``attention.attend_cache``.

    Returns:
      (logits (B, V) float32 after the chunk, state for ``vlm.decode_step``, drops over the chunk's buffers).
    """
    plan = config.schedule.plan(config.text.num_layers, chunk.bucket)
    buffer = embed(config, params, chunk, plan[0].slots, implementation)
    output = run_stages(config, params["stages"], plan, buffer, chunk.bucket.images, past=state, max_positions=slots)
    return next_logits(config, params, output.buffer), output.state, output.drops


def rerank(
    config: LlavaConfig,
    params: Params,
    chunk: Batch,
    whole: Batch,
    cache: StageCache | None,
    first: jax.Array,
    output: FirstStage,
    new_slots: int,
    *,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, DecodeState, FirstStage, tuple[DropRecord, ...]]:
    """The question ranks all image tokens anew: the same result as ``vlm.prefill`` of the whole conversation.

    The first stage drops nothing, so what it computed holds for any question: the chunk runs through it on its cache.
    The later stages run again, over all tokens.

    Args:
      whole: the conversation up to the end of the chunk; its crops are not used.
      cache: of the first stage, with a slot for every token of the conversation; None if it has no layers.
      first: (B,) int32, tokens before the chunk.
      output: for the tokens before the chunk; its S is ``whole.bucket.slots`` or more.
      new_slots: slots of the later stages' caches for tokens to come.

    Returns:
      (logits (B, V) float32 after the chunk, state for ``vlm.decode_step``, ``output`` with the chunk's tokens, drops
      over the buffers of the whole conversation).
    """
    stages, num_layers, delta = params["stages"], config.text.num_layers, None
    if whole.positions is not None:  # at the chunk's first token, whose own first position is 0
        at = jnp.minimum(first, whole.bucket.slots - 1)[:, None, None]
        delta = jnp.take_along_axis(jnp.asarray(whole.positions), at, axis=1)[:, 0, 0] - first
    index = None
    if config.text.by_slots:  # the first stage drops nothing: its slots are those before any drop
        room = output.slots if cache is None else cache.slots
        index = (jnp.broadcast_to(jnp.arange(room), (len(first), room)),)
    new = run_stages(
        config,
        stages,
        config.schedule.plan(num_layers, chunk.bucket)[:1],
        embed(config, params, chunk, chunk.bucket.slots, implementation),
        chunk.bucket.images,
        past=DecodeState((cache,), (first,), delta, index),
        max_positions=output.slots,
    )
    slots = first[:, None] + jnp.arange(chunk.bucket.slots)  # (B, T)

    def written(old: jax.Array, new: jax.Array | float) -> jax.Array:
        return old.at[jnp.arange(len(slots))[:, None], slots].set(new, mode="drop")

    additions = output.additions
    if additions is not None:  # a chunk without pictures has none
        additions = written(additions, 0.0 if new.buffer.additions is None else new.buffer.additions)
    output = FirstStage(written(output.hidden, new.buffer.hidden), additions)
    S = whole.bucket.slots
    additions = None if additions is None else additions[:, :S]

    plan = config.schedule.plan(num_layers, whole.bucket, aligned(implementation))
    logits, state, drops = run_later(
        config,
        params,
        plan,
        buffer_of(config, whole, output.hidden[:, :S], plan[0].slots, additions=additions),
        whole.bucket.images,
        new.state,
        new_slots,
        implementation=implementation,
    )
    return logits, state, output, drops


def run_later(
    config: LlavaConfig,
    params: Params,
    plan: Sequence[Stage],
    whole: TokenBuffer,
    image_sizes: Sequence[int],
    first: DecodeState,
    new_slots: int,
    *,
    max_positions: int | None = None,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, DecodeState, tuple[DropRecord, ...]]:
    """The stages after the first over all tokens, ``whole``, the first stage's output; ``first`` is its state.

    Returns:
      (logits (B, V) float32 after the last token, state for ``vlm.decode_step``, drops).
    """
    later = run_stages(
        config,
        params["stages"],
        plan,
        whole,
        image_sizes,
        first=1,
        max_positions=max_positions,
        new_slots=new_slots,
        implementation=implementation,
    )
    state = DecodeState(
        (*first.caches, *later.state.caches),
        (*first.lengths, *later.state.lengths),
        first.rope_delta if later.state.rope_delta is None else later.state.rope_delta,
        None if first.index is None else (*first.index, *(later.state.index or ())),
    )
    return next_logits(config, params, later.buffer), state, later.drops
