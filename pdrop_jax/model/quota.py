"""QUOTA's token score (arXiv 2604.17320), which is computed under the quantized forward pass.

The paper's text was not at hand: from notes on it we know which four quantities are combined, each clipped to its
percentiles and rescaled in each layer. Its weights, the sign of the residual's and the percentiles are not known; those
here are a reconstruction.
"""

import jax
import jax.numpy as jnp

from pdrop_jax.batch import IGNORE
from pdrop_jax.model.drop import Boundary, TokenBuffer, next_attention
from pdrop_jax.model.quantization import is_quantized, quantize_along

# Of the magnitude, the attention of text, the attention of image tokens, and the quantization residual.
WEIGHTS = (1.0, 1.0, 1.0, 1.0)
PERCENTILES = (0.1, 0.9)


def quota(at: Boundary) -> jax.Array:
    """The weighted sum (B, S) of four quantities of each image token v, each rescaled to 0..1 among a row's images:

    - magnitude: the L2 norm of v, its hidden state before the next layer;
    - the attention of text tokens to it in the next layer, mean over heads and tokens;
    - the attention of image tokens to it, likewise;
    - the residual of quantization, the L2 norm of Q(v) - v, where Q rounds as the inputs of the next layer's products
      are rounded. 0 for all tokens if the model's activations are not quantized.
    """
    buffer = at.buffer
    image = buffer.image_id > 0
    hidden = buffer.hidden.astype(jnp.float32)
    residual = jnp.zeros(image.shape, jnp.float32)
    kernel = at.next_layer["attention"]["q"]["kernel"]
    if is_quantized(kernel) and kernel.activations is not None:
        qvalue, scale = quantize_along(hidden, kernel.activations, [-1])
        residual = jnp.linalg.norm(qvalue.astype(jnp.float32) * scale - hidden, axis=-1)
    parts = (
        jnp.linalg.norm(hidden, axis=-1),
        next_attention(at, text_rows(buffer)),
        next_attention(at, jnp.where(image, jnp.arange(buffer.slots), -1)),
        residual,
    )
    weights = at.config.schedule.weights or WEIGHTS
    return sum((weight * rescaled(part, image) for weight, part in zip(weights, parts, strict=True)), 0.0 * residual)


def text_rows(buffer: TokenBuffer) -> jax.Array:
    """The slots (B, S) of text tokens that are not targets, -1 for all other tokens."""
    slot = jnp.arange(buffer.slots)
    asks = (buffer.image_id == 0) & (slot < buffer.length[:, None])
    if buffer.labels is not None:
        asks &= buffer.labels == IGNORE
    return jnp.where(asks, slot, -1)


def rescaled(x: jax.Array, among: jax.Array) -> jax.Array:
    """``x`` (B, S) clipped to its ``PERCENTILES`` among some slots of each row (B, S) bool, and these moved to 0 and 1.

    0 where all values are alike, and outside ``among``.
    """
    last = jnp.maximum(among.sum(1, keepdims=True) - 1, 0)  # (B, 1)
    ordered = jnp.sort(jnp.where(among, x, jnp.inf), axis=1)

    def percentile(share: float) -> jax.Array:  # between neighbours, as numpy.percentile
        at = share * last
        below = jnp.floor(at).astype(jnp.int32)
        low, high = (jnp.take_along_axis(ordered, i, axis=1) for i in (below, jnp.minimum(below + 1, last)))
        return low + (high - low) * (at - below)

    low, high = map(percentile, PERCENTILES)
    spread = high > low
    return jnp.where(among & spread, (jnp.clip(x, low, high) - low) / jnp.where(spread, high - low, 1), 0)
