"""PyramidDrop's drop at a stage boundary: score the image tokens, select the best, compact the buffer (section 3.2).

Every shape is static. A row's tokens fill its buffer from the left, and a drop moves the kept ones to the left of a
shorter buffer. ``drop`` is the whole method: a score, from here or from ``scores``, ``select_tokens`` and ``compact``.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pdrop_jax.batch import IGNORE
from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.model.attention import attention_mask
from pdrop_jax.model.cache import as_cached, restored
from pdrop_jax.model.layers import project_key, project_query, text_norm
from pdrop_jax.model.params import Params
from pdrop_jax.model.rope import Rope
from pdrop_jax.model.slot_attention import EVERYTHING, Places, sees
from pdrop_jax.schedule import Stage, keep_table
from pdrop_jax.sharding import constrain, constrain_hidden


class Past(NamedTuple):
    """Tokens before the buffer's: their cached keys (B, K, C, H), their number (B,), and where they stand."""

    keys: jax.Array
    length: jax.Array
    places: Places | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TokenBuffer:
    """The tokens that a stage sees. Rows are left-aligned: slots from ``length`` on are padding.

    B rows, S slots, D model, Q query rows, M images.

    Attributes:
      hidden: (B, S, D), input of the stage's first layer.
      image_id: (B, S) int32, 0 for text and padding, m for a token of the row's m-th image.
      index: (B, S) int32, the slot that the token had before the first drop.
      length: (B,) int32, valid slots.
      query_rows: (B, Q) int32, slots whose attention ranks the image tokens; -1 is unused.
      image_count: (B, M + 1) int32, tokens of each image before the first drop; column 0 counts the rest.
      labels: (B, S) int32 next-token targets, or None.
      precomputed_scores: (B, S) float32, what a score knows of a token before the decoder (``scores.TokenScore``), or
        None.
      positions: (B, S, 3) int32, time, height and width of M-RoPE, which stay with a token; None without it.
      additions: (B, S, A, D), what is added to a token behind each of the first A decoder layers (DeepStack), zero for
        text; None without it and in stages behind those layers.
    """

    hidden: jax.Array
    image_id: jax.Array
    index: jax.Array
    length: jax.Array
    query_rows: jax.Array
    image_count: jax.Array
    labels: jax.Array | None = None
    precomputed_scores: jax.Array | None = None
    positions: jax.Array | None = None
    additions: jax.Array | None = None

    @property
    def slots(self) -> int:
        return self.hidden.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DropRecord:
    """What happened at one stage boundary; all (B, S) over the buffer before the drop.

    Attributes:
      scores: float32, the larger is kept.
      keep: bool.
      image_id: int32, 0 for text and padding.
      index: int32, slot before the first drop.
    """

    scores: jax.Array
    keep: jax.Array
    image_id: jax.Array
    index: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Boundary:
    """What a score may look at.

    Attributes:
      config: static.
      number: static, 0 at the first drop.
      buffer: tokens before the drop; ``hidden`` is the next layer's input.
      rope: (B, S, H) each, at the positions of the buffer's tokens, as the next layer turns them.
      next_layer: parameters of the layer after the boundary.
      places: of the buffer's tokens, where windows go by the slots before the drops; otherwise None.
      past: keys of earlier turns in the next layer's cache, or None.
      last_layer: parameters of the layer before the boundary; None before the first layer.
      last_rope: as ``rope``, for that layer.
      last_input: (B, S, D), the input of that layer; None unless the score needs it.
    """

    config: LlavaConfig = dataclasses.field(metadata={"static": True})
    number: int = dataclasses.field(metadata={"static": True})
    buffer: TokenBuffer
    rope: Rope
    next_layer: Params
    places: Places | None = None
    past: Past | None = None
    last_layer: Params | None = None
    last_rope: Rope | None = None
    last_input: jax.Array | None = None

    @property
    def layer(self) -> int:
        """The number of the layer after the boundary."""
        return self.config.schedule.layers[self.number]


@jax.named_scope("drop")
def drop(
    stage: Stage, at: Boundary, score: Callable[[Boundary], jax.Array], max_count: int
) -> tuple[TokenBuffer, DropRecord]:
    """One stage boundary: score, select, compact.

    Args:
      stage: the stage after the boundary.
      score: ``Boundary`` -> (B, S) float32.
      max_count: the largest number of tokens that an image of the bucket can have.

    Returns:
      (the buffer of ``stage``, what happened).
    """
    buffer = at.buffer
    scores = jax.lax.stop_gradient(score(at))
    keep = select_tokens(buffer, scores, stage.ratio, max_count)
    return compact(buffer, keep, stage.slots), DropRecord(scores, keep, buffer.image_id, buffer.index)


def pyramiddrop_score(at: Boundary) -> jax.Array:
    """PyramidDrop's score, (B, S): the attention that the query rows pay to each slot in the layer after the boundary.

    The official code scores with that layer too.
    """
    return next_attention(at, at.buffer.query_rows)


def next_attention(
    at: Boundary, rows: jax.Array, *, rotated: bool = True, past: bool = True, among: jax.Array | None = None
) -> jax.Array:
    """``attention_scores`` of ``rows`` in the layer after the boundary, without rope unless ``rotated``."""
    return attention_scores(
        at.config.text,
        at.next_layer,
        at.buffer.hidden,
        rows,
        at.rope if rotated else None,
        at.past if past else None,
        among,
        layer=at.layer,
        places=at.places,
    )


def attention_scores(
    config: TextConfig,
    params: Params,
    hidden: jax.Array,
    query_rows: jax.Array,
    rope: Rope | None,
    past: Past | None = None,
    among: jax.Array | None = None,
    *,
    layer: int = 0,
    places: Places | None = None,
) -> jax.Array:
    """Attention from some rows to every slot in one layer: mean over heads, then over the rows.

    The layer's norm, q and k projections and rope on its input; softmax in float32 over all keys that the row sees in
    the layer's attention. Keys are projected at every slot, queries only at the query rows, values not at all. No
    gradient flows through.

    Args:
      params: of the layer.
      hidden: (B, S, D), its input.
      query_rows: (B, Q) int32; -1 is unused.
      rope: (B, S, H) each; None rotates nothing.
      past: cached keys of the layer, which take part in the softmax.
      among: (B, S) bool, slots that the softmax runs over; None is all.
      layer: its number, which says whether it has a window; what lies outside has a score of 0.
      places: of the slots, where windows go by the slots before the drops.

    Returns:
      (B, S) float32.
    """
    h = text_norm(config, params["attention_norm"], jax.lax.stop_gradient(hidden))
    rows = jnp.maximum(query_rows, 0)  # (B, Q)
    row_rope = None
    if rope is not None:
        cos, sin = (jnp.take_along_axis(x, rows[..., None], axis=1) for x in rope)
        row_rope = cos, sin
    q = project_query(config, params, jnp.take_along_axis(h, rows[..., None], axis=1), row_rope)
    q = constrain(q, "batch", None, "heads", None)  # few rows: their hidden states are moved, not the weights
    k = project_key(config, params, h, rope)
    k = restored(as_cached(k, config.cache_dtype), k.dtype)
    B, Q, _, H = q.shape
    S, window = hidden.shape[1], config.window_of(layer)
    q = q.reshape(B, Q, k.shape[2], -1, H)  # (B, Q, K, G, H)
    logits = jnp.einsum("BQKGH,BSKH->BKGQS", q, k, preferred_element_type=jnp.float32) / H**0.5
    if places is None:
        seen = attention_mask(rows, jnp.arange(S), window=window)
    else:
        seen = sees(places.at(rows), places, window or EVERYTHING)
    if among is not None:
        seen &= among[:, None]
    if past is not None:
        before = jnp.einsum("BQKGH,BKCH->BKGQC", q, past.keys, preferred_element_type=jnp.float32) / H**0.5
        slots = jnp.arange(past.keys.shape[2])
        logits = jnp.concatenate([logits, before], axis=-1)
        if places is None or past.places is None:
            cached = attention_mask(past.length[:, None] + rows, slots, window=window, length=past.length)
        else:
            old = (past.places.slot < past.length[:, None])[:, None]
            cached = sees(places.at(rows), past.places, window or EVERYTHING) & old
        seen = jnp.concatenate([seen, cached], axis=-1)
    masked = jnp.finfo(jnp.float32).min  # finite: among ``among`` a row may see nothing
    probs = jax.nn.softmax(jnp.where(seen[:, None, None], logits, masked), axis=-1)[..., :S]
    used = (query_rows >= 0).astype(jnp.float32)  # (B, Q)
    by_row = probs.mean((1, 2)) * used[..., None]  # (B, Q, S)
    return jax.lax.stop_gradient(by_row.sum(1) / jnp.maximum(used.sum(1), 1)[:, None])


def select_tokens(buffer: TokenBuffer, scores: jax.Array, ratio: float, max_count: int) -> jax.Array:
    """Which slots are kept: all text, and the best ``int(count * ratio)`` tokens of each image, ties to the lower slot.

    Args:
      scores: (B, S) float32.
      ratio: share of the image's original tokens.
      max_count: the largest number of tokens that an image of the bucket can have.

    Returns:
      (B, S) bool, False on padding.
    """
    order = jax.vmap(jnp.lexsort)((-scores, buffer.image_id))  # by image, best first; stable
    place = jnp.argsort(order, axis=-1)  # where each slot is in that order
    M = buffer.image_count.shape[1] - 1
    present = (buffer.image_id[:, None, :] == jnp.arange(M + 1)[:, None]).sum(-1)  # (B, M + 1)
    first = jnp.cumsum(present, axis=1) - present
    rank = place - jnp.take_along_axis(first, buffer.image_id, axis=1)  # within the slot's own image
    table = jnp.array(keep_table(max_count, ratio), jnp.int32)
    counts = table[jnp.minimum(buffer.image_count, max_count)]  # (B, M + 1)
    kept_image = rank < jnp.take_along_axis(counts, buffer.image_id, axis=1)
    valid = jnp.arange(buffer.slots) < buffer.length[:, None]
    return valid & ((buffer.image_id == 0) | kept_image)


def compact(buffer: TokenBuffer, keep: jax.Array, slots: int) -> TokenBuffer:
    """Moves the kept tokens to the left, in order, into a buffer of ``slots`` slots.

    Example, one row, ``slots=4``::

        hidden  a b c d e .      keep  1 0 1 1 0 0
        result  a c d .          length 3

    A query row that is itself dropped passes to the last kept token before it: in plain pretraining the query row is
    the image token right before the caption, whichever that is after a drop.

    Args:
      keep: (B, S) bool; False on padding. At most ``slots`` a row.
    """
    S = keep.shape[1]
    kept_up_to = jnp.cumsum(keep, axis=1)  # (B, S)
    length = kept_up_to[:, -1]
    target = jnp.where(keep, kept_up_to - 1, slots)  # dropped tokens fall off the end

    @jax.vmap  # row by row, or a mesh would gather all rows for the scatter
    def source_of(target: jax.Array) -> jax.Array:
        return jnp.zeros(slots, jnp.int32).at[target].set(jnp.arange(S, dtype=jnp.int32), mode="drop")

    source = source_of(target)  # (B, slots)
    valid = jnp.arange(slots) < length[:, None]  # (B, slots)

    def gather(x: jax.Array, padding: int) -> jax.Array:
        return jnp.where(valid, jnp.take_along_axis(x, source, axis=1), padding)

    def carry_along(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.take_along_axis(x, jnp.expand_dims(source, tuple(range(2, x.ndim))), axis=1)

    precomputed = buffer.precomputed_scores
    query_rows = jnp.take_along_axis(kept_up_to, jnp.maximum(buffer.query_rows, 0), axis=1) - 1
    return dataclasses.replace(
        buffer,
        hidden=constrain_hidden(jnp.take_along_axis(constrain_hidden(buffer.hidden), source[..., None], axis=1)),
        image_id=gather(buffer.image_id, 0),
        index=gather(buffer.index, 0),
        length=length,
        query_rows=jnp.where(buffer.query_rows < 0, -1, query_rows),
        labels=None if buffer.labels is None else gather(buffer.labels, IGNORE),
        precomputed_scores=None if precomputed is None else gather(precomputed, 0),
        positions=carry_along(buffer.positions),
        additions=carry_along(buffer.additions),
    )
