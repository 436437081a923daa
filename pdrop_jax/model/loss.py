"""Next-token cross-entropy on the tokens left after the drops, without the logits of all positions at once."""

import jax
import jax.numpy as jnp

from pdrop_jax.batch import IGNORE, Batch
from pdrop_jax.config import Implementation, LlavaConfig, Remat
from pdrop_jax.model.drop import DropRecord, TokenBuffer
from pdrop_jax.model.params import Params
from pdrop_jax.model.vlm import forward_hidden, unembed
from pdrop_jax.sharding import constrain, shards

CHUNK = 1024  # positions of a device whose logits exist at the same time


def compute_loss(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    *,
    implementation: Implementation = "auto",
    remat: Remat = "none",
) -> tuple[jax.Array, tuple[DropRecord, ...]]:
    """The sum of the cross-entropies of ``batch``'s targets, () float32, and what was dropped.

    Divide by ``count_targets``: the official loss is the mean over all targets of a batch.
    """
    output = forward_hidden(config, params, batch, implementation=implementation, remat=remat)
    return cross_entropy(config, params, output.buffer, most=batch.bucket.text), output.drops


def count_targets(labels: jax.Array) -> jax.Array:
    """Targets in labels (B, S), () int32. Text is never dropped, and nothing stands before slot 0 to predict it."""
    return (labels[:, 1:] != IGNORE).sum()


@jax.named_scope("head")
def cross_entropy(config: LlavaConfig, params: Params, buffer: TokenBuffer, most: int, chunk: int = CHUNK) -> jax.Array:
    """Sum of the next-token cross-entropies over the targets of ``buffer``, () float32.

    The positions of the targets are gathered, then processed in chunks whose logits are recomputed for the gradient:
    (B, S, V) never exists.

    Args:
      buffer: the last stage's tokens, ``hidden`` after the final norm, ``labels`` not shifted.
      most: the largest number of targets of a row.
      chunk: positions of a device whose logits exist at the same time. On a mesh each chunk gathers the head and sums
        its gradient over the devices, so there should be few.
    """
    assert buffer.labels is not None
    B, S = buffer.labels.shape
    targets = jnp.pad(buffer.labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)  # of each slot, (B, S)
    width = min(max(chunk * shards("batch", B) // B, 1), most, S)
    chunks = -(-min(most, S) // width)
    source = jnp.argsort(targets == IGNORE, axis=1, stable=True)[:, : chunks * width]  # targets first
    pad = ((0, 0), (0, chunks * width - source.shape[1]))
    targets = jnp.pad(jnp.take_along_axis(targets, source, axis=1), pad, constant_values=IGNORE)
    source = jnp.pad(source, pad)
    source, targets = (x.reshape(B, chunks, width).swapaxes(0, 1) for x in (source, targets))

    @jax.checkpoint
    def of_chunk(source: jax.Array, targets: jax.Array) -> jax.Array:  # both (B, width)
        x = constrain(jnp.take_along_axis(buffer.hidden, source[..., None], axis=1), "batch", None, None)
        logits = unembed(config, params, x)  # (B, width, V) float32
        picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(targets == IGNORE, 0.0, jax.nn.logsumexp(logits, axis=-1) - picked).sum()

    def body(total: jax.Array, column: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        has_target = (column[1] != IGNORE).any()
        return total + jax.lax.cond(has_target, of_chunk, lambda *_: jnp.float32(0), *column), None

    return jax.lax.scan(body, jnp.float32(0), (source, targets))[0]
