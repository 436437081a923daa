"""TokenBuffer: the tokens of one stage in a buffer of static length, and its compaction at a drop."""

import dataclasses

import jax
import jax.numpy as jnp

from pdrop_jax.sharding import constrain


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
      query_rows: (B, Q) int32, slots that rank the image tokens; -1 is unused.
      image_count: (B, M + 1) int32, tokens of each image before the first drop; column 0 counts the rest.
      labels: (B, S) int32 next-token targets, or None.
      hint: (B, S) float32, what the schedule's score knows before the decoder (``scores.TokenScore``), or None.
    """

    hidden: jax.Array
    image_id: jax.Array
    index: jax.Array
    length: jax.Array
    query_rows: jax.Array
    image_count: jax.Array
    labels: jax.Array | None = None
    hint: jax.Array | None = None

    @property
    def slots(self) -> int:
        return self.hidden.shape[1]


def compact(buffer: TokenBuffer, keep: jax.Array, slots: int) -> TokenBuffer:
    """Moves the kept tokens to the left, in their order, into a buffer of ``slots`` slots.

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

    @jax.vmap  # row by row, or a mesh would bring all rows together for the scatter
    def source_of(target: jax.Array) -> jax.Array:
        return jnp.zeros(slots, jnp.int32).at[target].set(jnp.arange(S, dtype=jnp.int32), mode="drop")

    source = source_of(target)  # (B, slots)
    valid = jnp.arange(slots) < length[:, None]  # (B, slots)

    def gather(x: jax.Array, padding: int) -> jax.Array:
        return jnp.where(valid, jnp.take_along_axis(x, source, axis=1), padding)

    query_rows = jnp.take_along_axis(kept_up_to, jnp.maximum(buffer.query_rows, 0), axis=1) - 1
    return dataclasses.replace(
        buffer,
        hidden=constrain(jnp.take_along_axis(buffer.hidden, source[..., None], axis=1), "batch", None, None),
        image_id=gather(buffer.image_id, 0),
        index=gather(buffer.index, 0),
        length=length,
        query_rows=jnp.where(buffer.query_rows < 0, -1, query_rows),
        labels=None if buffer.labels is None else gather(buffer.labels, -100),
        hint=None if buffer.hint is None else gather(buffer.hint, 0),
    )
