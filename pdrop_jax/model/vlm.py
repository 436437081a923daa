"""The whole model as pure functions: pixels and token ids -> embeddings -> stages -> logits."""

import dataclasses

import jax
import jax.numpy as jnp

from pdrop_jax.batch import IGNORE, Batch
from pdrop_jax.config import Implementation, LlavaConfig, Remat
from pdrop_jax.model.attention import aligned
from pdrop_jax.model.decoder import DecoderOutput, DecodeState, run_stages, run_token
from pdrop_jax.model.drop import DropRecord, TokenBuffer
from pdrop_jax.model.layers import text_norm
from pdrop_jax.model.params import Params
from pdrop_jax.model.scores import find_score
from pdrop_jax.model.standby import Block
from pdrop_jax.model.vision import tower_features
from pdrop_jax.sharding import constrain, shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Output:
    """Result of ``forward`` and ``forward_hidden``.

    Attributes:
      logits: (B, S_last, V) float32, over the last stage's buffer; garbage on padding. None from ``forward_hidden``.
      buffer: the last stage's tokens; ``hidden`` is after the final norm.
      lengths: (B,) int32 for each stage, its valid slots.
      drops: one for each stage boundary.
      layer_inputs: for each stage (L_s, B, S_s, D), or None if not asked for.
    """

    logits: jax.Array | None
    buffer: TokenBuffer
    lengths: tuple[jax.Array, ...]
    drops: tuple[DropRecord, ...]
    layer_inputs: tuple[jax.Array | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageEmbeddings:
    """What the vision tower knows of image tokens; zero for text.

    Attributes:
      hidden: (B, S, D), the tokens' embeddings.
      additions: (B, S, A, D), see ``TokenBuffer``; None without DeepStack.
      attention: (B, S) float32, that of the tower's class token; None unless the score needs it.
      block: of a stream's frame, see ``standby.Block``; otherwise None.
    """

    hidden: jax.Array
    additions: jax.Array | None = None
    attention: jax.Array | None = None
    block: Block | None = None


def embed_images(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    implementation: Implementation = "auto",
    remat: Remat = "none",
    block: Block | None = None,
) -> ImageEmbeddings:
    """The image tokens of a batch from its crops, of which there must be at least one a row.

    Args:
      block: for the single crop of a single row, of what its standby tokens see over time; see ``standby.Block``.
    """
    needed = find_score(config).class_attention
    features, seen, block = tower_features(config, params, batch, implementation, remat, needed, block)
    index = jnp.asarray(batch.feature_index)
    shown = index[..., :1] >= 0

    def pick(pool: jax.Array) -> jax.Array:
        return jnp.where(shown, _pick(pool, index, batch.feature_weight), 0)

    own, *deeper = jnp.split(features, 1 + config.additions, axis=1)  # DeepStack's follow the features themselves
    return ImageEmbeddings(
        pick(own),
        jnp.stack([pick(pool) for pool in deeper], axis=2) if deeper else None,
        None if seen is None else pick(seen)[..., 0],
        block,
    )


def embed(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    slots: int,
    implementation: Implementation = "auto",
    remat: Remat = "none",
    images: ImageEmbeddings | None = None,
) -> TokenBuffer:
    """Splices text embeddings and image features into the first stage's buffer, padded to ``slots`` slots.

    Args:
      images: what ``embed_images`` would make of the crops, which are not used then.
    """
    hidden = embed_tokens(config, params, batch.token_ids)
    if images is None and batch.crops.shape[1]:
        images = embed_images(config, params, batch, implementation, remat)
    if images is None:
        return buffer_of(config, batch, hidden, slots)
    standby = jnp.asarray(batch.feature_index)[..., :1] >= 0  # they belong to no image that is dropped by its count
    hidden = jnp.where((jnp.asarray(batch.image_id)[..., None] > 0) | standby, images.hidden, hidden)
    return buffer_of(config, batch, hidden, slots, images.attention, images.additions)


@jax.named_scope("embed")
def buffer_of(
    config: LlavaConfig,
    batch: Batch,
    hidden: jax.Array,
    slots: int,
    attention: jax.Array | None = None,
    additions: jax.Array | None = None,
) -> TokenBuffer:
    """The batch's tokens with ``hidden`` (B, S, D) before any drop, padded to ``slots`` slots.

    Args:
      attention: (B, S) float32, that of the class tokens.
      additions: (B, S, A, D), see ``TokenBuffer``.
    """
    B, S = batch.token_ids.shape
    image_id = jnp.asarray(batch.image_id)
    image_count = (image_id[:, None] == jnp.arange(len(batch.bucket.images) + 1)[:, None]).sum(-1)  # (B, M + 1)
    precompute = find_score(config).precompute if batch.bucket.images else None

    def pad(x: jax.Array, value: int = 0) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, slots - S)] + [(0, 0)] * (x.ndim - 2), constant_values=value)

    return TokenBuffer(
        hidden=constrain(pad(hidden), "batch", None, None),
        image_id=pad(image_id),
        index=jnp.broadcast_to(jnp.arange(slots), (B, slots)),
        length=jnp.asarray(batch.length),
        query_rows=jnp.asarray(batch.query_rows),
        image_count=image_count,
        labels=None if batch.labels is None else pad(jnp.asarray(batch.labels), IGNORE),
        precomputed_scores=None if precompute is None else pad(precompute(config, batch, attention)),
        positions=None if batch.positions is None else pad(jnp.asarray(batch.positions)),
        additions=None if additions is None else constrain(pad(additions), "batch", None, None, None),
    )


@jax.named_scope("embed")
def _pick(features: jax.Array, index: jax.Array, weight: jax.typing.ArrayLike | None) -> jax.Array:
    """Features (B, P, D) at ``index`` (B, S, T), blended by ``weight`` (B, S, T) float32 -> (B, S, D)."""
    B, S, T = index.shape
    picked = jnp.take_along_axis(features, jnp.maximum(index, 0).reshape(B, S * T, 1), axis=1)
    if weight is None:
        return picked
    blended = picked.reshape(B, S, T, -1) * jnp.asarray(weight)[..., None]
    return blended.sum(2).astype(features.dtype)


@jax.named_scope("embed")
def embed_tokens(config: LlavaConfig, params: Params, ids: jax.typing.ArrayLike) -> jax.Array:
    """Token ids (B, T) -> (B, T, D)."""
    x = constrain(_rows_of(jnp.asarray(params["embed"]["embedding"]), jnp.asarray(ids)), "batch", None, None)
    # The factor is rounded to the dtype, as in transformers: 55.5 in bfloat16 for a width of 3072.
    return x * jnp.asarray(config.text.hidden_size**0.5, x.dtype) if config.text.scaled_embeddings else x


# Along fsdp each device looks up its own part of D for the tokens of all of them: they exchange hidden states, which
# are smaller than the table. The gradient of a token that occurs often is a long sum, therefore in float32.
@jax.custom_vjp
def _rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    rows = _shared_rows(table)
    return constrain(table[constrain(ids, rows, None)], rows, None, "model")


def _shared_rows(table: jax.Array) -> str:
    """Logical axis of the rows that a device looks up; where fsdp does not cut D, its own alone."""
    return "copies" if shards("model", table.shape[1]) > 1 else "batch"


def _rows_forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rows_of(table, ids), (table, ids)


def _rows_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    table, ids = saved
    rows = _shared_rows(table)
    g = constrain(g, rows, None, "model").astype(jnp.float32)
    total = jnp.zeros(table.shape, jnp.float32).at[constrain(ids, rows, None)].add(g)
    return constrain(total.astype(table.dtype), "vocab", "model"), None


_rows_of.defvjp(_rows_forward, _rows_backward)


@jax.named_scope("head")
def unembed(config: LlavaConfig, params: Params, x: jax.Array) -> jax.Array:
    """Normed hidden states (B, T, D) -> logits (B, T, V) float32."""
    if config.text.tie_embeddings:
        kernel, spec = params["embed"]["embedding"], "BTD,VD->BTV"
    else:
        kernel, spec = params["head"]["kernel"], "BTD,DV->BTV"
    return jnp.einsum(spec, x, kernel, preferred_element_type=jnp.float32)


def final_norm(config: LlavaConfig, params: Params, x: jax.Array) -> jax.Array:
    return text_norm(config.text, params["norm"], x)


def forward_hidden(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    *,
    implementation: Implementation = "auto",
    remat: Remat = "none",
    keep_hidden: bool = False,
) -> Output:
    """Everything but the head, without caches; ``logits`` is None."""
    plan = config.schedule.plan(config.text.num_layers, batch.bucket, aligned(implementation))
    output = run_stages(
        config,
        params["stages"],
        plan,
        embed(config, params, batch, plan[0].slots, implementation, remat),
        batch.bucket.images,
        implementation=implementation,
        remat=remat,
        keep_hidden=keep_hidden,
    )
    buffer = dataclasses.replace(output.buffer, hidden=final_norm(config, params, output.buffer.hidden))
    return Output(
        logits=None,
        buffer=buffer,
        lengths=output.state.lengths,
        drops=output.drops,
        layer_inputs=output.layer_inputs,
    )


def forward(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    *,
    implementation: Implementation = "auto",
    keep_hidden: bool = False,
) -> Output:
    """All logits of the last stage, without caches."""
    output = forward_hidden(config, params, batch, implementation=implementation, keep_hidden=keep_hidden)
    return dataclasses.replace(output, logits=unembed(config, params, output.buffer.hidden))


def prefill(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    new_slots: int,
    *,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, DecodeState, tuple[DropRecord, ...]]:
    """Runs the prompts and fills the caches.

    Args:
      new_slots: cache slots for tokens to come.

    Returns:
      (logits (B, V) float32 after the last prompt token, state for ``decode_step``, drops).
    """
    output = run_prompts(config, params, batch, new_slots, implementation=implementation)
    return next_logits(config, params, output.buffer), output.state, output.drops


def run_prompts(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    new_slots: int,
    *,
    images: ImageEmbeddings | None = None,
    implementation: Implementation = "auto",
) -> DecoderOutput:
    """``prefill`` up to the last layer; ``images`` as of ``embed``."""
    plan = config.schedule.plan(config.text.num_layers, batch.bucket, aligned(implementation))
    buffer = embed(config, params, batch, plan[0].slots, implementation, images=images)
    return run_stages(
        config, params["stages"], plan, buffer, batch.bucket.images, new_slots=new_slots, implementation=implementation
    )


def next_logits(config: LlavaConfig, params: Params, buffer: TokenBuffer) -> jax.Array:
    """Logits (B, V) float32 after the last token of each row, from the output of the last layer."""
    last = jnp.take_along_axis(buffer.hidden, (buffer.length - 1)[:, None, None], axis=1)  # (B, 1, D)
    return unembed(config, params, final_norm(config, params, last))[:, 0]


def decode_step(
    config: LlavaConfig, params: Params, tokens: jax.Array, state: DecodeState, step: jax.Array
) -> tuple[jax.Array, DecodeState]:
    """Logits (B, V) float32 after ``tokens`` (B,) int32, the (step + 1)-th new token of each row."""
    x, state = run_token(config, params["stages"], embed_tokens(config, params, tokens[:, None]), state, step)
    return unembed(config, params, final_norm(config, params, x))[:, 0], state
