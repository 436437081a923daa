"""PyramidDrop's choice of image tokens: how much the question attends to each, and which stay.

Paper, section 3.2. The official code scores with the layer *after* the boundary, and so does this.
"""

import jax
import jax.numpy as jnp

from pdrop_jax.config import TextConfig
from pdrop_jax.model.drop import TokenBuffer
from pdrop_jax.model.layers import Params, Rope, rotate
from pdrop_jax.model.lora import bind_layer
from pdrop_jax.schedule import keep_table
from pdrop_jax.sharding import explicit

Past = tuple[jax.Array, jax.Array]  # keys (B, K, C, H) of tokens before the buffer's, and how many, (B,)


def image_scores(
    config: TextConfig, next_layer: Params, buffer: TokenBuffer, rope: Rope, past: Past | None = None
) -> jax.Array:
    """PyramidDrop's score: attention that the query rows pay to every slot in the layer after the boundary.

    Args:
      next_layer: parameters of the first layer behind the boundary.
      rope: (B, S, H/2) each, at the positions of the current tokens.
      past: what the next layer has cached, which takes its part of the softmax; None is nothing.

    Returns:
      (B, S) float32.
    """
    return attention_paid(config, next_layer, buffer.hidden, buffer.query_rows, rope, past)


def attention_paid(
    config: TextConfig,
    params: Params,
    hidden: jax.Array,
    query_rows: jax.Array,
    rope: Rope | None,
    past: Past | None = None,
    among: jax.Array | None = None,
) -> jax.Array:
    """Attention of some rows to every slot in one layer, mean over heads, mean over the rows.

    The layer's norm, q and k projections and rope on its input, softmax in float32 over all keys that the layer's
    attention lets the row see. Keys need a projection, values do not, and queries only at the query rows. No gradient
    flows through.

    Args:
      params: of the layer.
      hidden: (B, S, D), its input.
      query_rows: (B, Q) int32; -1 is unused.
      rope: (B, S, H/2) each; None rotates nothing.
      past: keys that the layer has cached, which take their part of the softmax.
      among: (B, S) bool, slots that the softmax is over; None is all.

    Returns:
      (B, S) float32.
    """
    layer = bind_layer(config, params)
    h = layer.attention_norm(jax.lax.stop_gradient(hidden))
    rows = jnp.maximum(query_rows, 0)  # (B, Q)
    q = layer.attention.q(jnp.take_along_axis(h, rows[..., None], axis=1))
    k = layer.attention.k(h)
    if rope is not None:
        cos, sin = (jnp.take_along_axis(x, rows[..., None], axis=1) for x in rope)
        q, k = rotate(q, (cos, sin)), rotate(k, rope)
    B, Q, _, H = q.shape
    S, window = hidden.shape[1], config.sliding_window
    q = q.reshape(B, Q, k.shape[2], -1, H)  # (B, Q, K, G, H)
    logits = jnp.einsum("BQKGH,BSKH->BKGQS", q, k, preferred_element_type=jnp.float32) / H**0.5
    slot = jnp.arange(S)
    seen = slot <= rows[..., None]  # (B, Q, S)
    if window is not None:
        seen &= slot > rows[..., None] - window
    if among is not None:
        seen &= among[:, None]
    hidden_from = jnp.finfo(jnp.float32).min  # finite: of ``among`` a row may see nothing
    logits = jnp.where(seen[:, None, None], logits, hidden_from)
    if past is not None:
        keys, length = past
        before = jnp.einsum("BQKGH,BKCH->BKGQC", q, keys, preferred_element_type=jnp.float32) / H**0.5
        slot = jnp.arange(keys.shape[2])
        there = jnp.broadcast_to(slot < length[:, None, None], (B, Q, len(slot)))
        if window is not None:
            there &= slot > (length[:, None] + rows)[..., None] - window
        before = jnp.where(there[:, None, None], before, hidden_from)
        logits = jnp.concatenate([logits, before], axis=-1)
    probs = jax.nn.softmax(logits, axis=-1)[..., :S]
    used = (query_rows >= 0).astype(jnp.float32)  # (B, Q)
    by_row = probs.mean((1, 2)) * used[..., None]  # (B, Q, S)
    return jax.lax.stop_gradient(by_row.sum(1) / jnp.maximum(used.sum(1), 1)[:, None])


def choose(buffer: TokenBuffer, scores: jax.Array, ratio: float, max_count: int) -> jax.Array:
    """Which slots stay: all text, and of each image its best ``int(count * ratio)`` tokens, ties to the lower slot.

    Args:
      scores: (B, S) float32.
      ratio: share of the image's original tokens.
      max_count: the largest number of tokens an image of the bucket can have.

    Returns:
      (B, S) bool, False on padding.
    """
    order = jax.vmap(jnp.lexsort)((-scores, buffer.image_id))  # by image, best first; stable
    place = jnp.argsort(order, axis=-1)  # where each slot stands in that order
    M = buffer.image_count.shape[1] - 1
    present = (buffer.image_id[:, None, :] == jnp.arange(M + 1)[:, None]).sum(-1)  # (B, M + 1)
    first = jnp.cumsum(present, axis=1) - present
    rank = place - jnp.take_along_axis(first, buffer.image_id, axis=1)  # within the slot's own image
    table = jnp.array(keep_table(max_count, ratio), jnp.int32)
    cut = explicit(buffer.image_count.shape, "batch", None)
    counts = table.at[jnp.minimum(buffer.image_count, max_count)].get(out_sharding=cut)
    kept_image = rank < jnp.take_along_axis(counts, buffer.image_id, axis=1)
    valid = jnp.arange(buffer.slots) < buffer.length[:, None]
    return valid & ((buffer.image_id == 0) | kept_image)
