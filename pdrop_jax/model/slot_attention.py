"""What a token sees by the slots before the drops: sliding windows, and pictures whose tokens see each other both ways.

A drop moves tokens closer together, so that slots of a buffer or of a cache no longer say how far apart two tokens
stood. Here tokens carry the slot that they had before any drop: a window hides what stood too far back, whatever was
dropped in between. Where every layer has the same window, ``attention`` goes by the slots of the buffer instead.

The window is data: layers with and without one are layers of one stack, which a scan runs as one program. Keys outside
the window are masked, not skipped, and no flash kernel is used: none takes a mask that is neither causal nor static.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pdrop_jax.config import Implementation
from pdrop_jax.errors import UserError
from pdrop_jax.model.attention import attend_masked
from pdrop_jax.model.cache import KeysOrValues

EVERYTHING = 2**30  # the window of a layer that sees everything, more than any number of slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens stand, all (B, S) int32; B is 1 where all rows are alike.

    Attributes:
      slot: in the stage, after those of earlier turns; for the order of the tokens.
      index: slot before the first drop; for windows.
      group: 0 for text, otherwise the picture, if it sees itself both ways.
    """

    slot: jax.Array
    index: jax.Array
    group: jax.Array

    def at(self, rows: jax.Array) -> "Places":
        """The places of the tokens in slots ``rows`` (B, Q)."""
        whole = jnp.broadcast_arrays(self.slot, self.index, self.group)
        return Places(*(jnp.take_along_axis(x, rows, axis=1) for x in whole))

    def between(self, start: int, stop: int) -> "Places":
        return jax.tree.map(lambda x: x[:, start:stop], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """A cache of a stage whose slots are in no order, see ``model.ring``; here before the new tokens are written.

    Attributes:
      slots: (B, T) int32, where the new tokens go.
      order: (B, C) int32, ``Places.slot`` of what a slot holds; ``EVERYTHING`` if it holds nothing.
      index: (B, C) int32, see ``Places``.
      positions: (B, C) or (B, C, 3) int32, where the slot's key is rotated to when it is read: it is cached as it is
        projected.
    """

    slots: jax.Array
    order: jax.Array
    index: jax.Array
    positions: jax.Array

    @property
    def places(self) -> Places:
        return Places(self.order, self.index, jnp.zeros_like(self.order))

    def write(self, cached: jax.Array, new: jax.Array) -> jax.Array:
        """``cached`` (B, C, ...) with ``new`` (B, T, ...) in ``slots``."""
        return cached.at[jnp.arange(len(self.slots))[:, None], self.slots].set(new)

    def places_with(self, query: Places) -> Places:
        """Places of the slots once the new tokens are written."""
        new = (jnp.broadcast_to(x, self.slots.shape) for x in _arrays(query))
        return Places(*map(self.write, _arrays(self.places), new))


def sees(query: Places, key: Places, window: jax.Array | int) -> jax.Array:
    """Which keys each query sees, (B, T, S) bool: those up to itself and its whole picture, both within the window.

    Example, text, a picture of two tokens and text, of which ``index`` is 0 2 3 5, with a window of 4::

        1 . . .
        1 1 1 .
        1 1 1 .
        . 1 1 1
    """
    (slot, index, group), keys = ((x[:, :, None] for x in _arrays(query)), [x[:, None] for x in _arrays(key)])
    seen = (keys[0] <= slot) | ((group > 0) & (keys[2] == group))
    return seen & (keys[1] > index - window)


def _arrays(places: Places) -> tuple[jax.Array, jax.Array, jax.Array]:
    return places.slot, places.index, places.group


def stage_places(
    index: jax.Array, group: jax.Array, start: jax.Array, first_length: jax.Array, cached: jax.Array | None
) -> tuple[Places, Places]:
    """The places of a stage's queries, the tokens of its buffer, and of its keys, which may be in a cache.

    Args:
      index, group: (B, S) int32 of the buffer; ``index`` counts the new tokens alone.
      start: (B,) int32, slots of earlier tokens in the stage.
      first_length: (B,) int32, slots of earlier tokens before any drop.
      cached: (B, C) int32, the cache's slots before any drop; None if the keys are the buffer's.
    """
    slot = jnp.reshape(start, (-1, 1)) + jnp.arange(index.shape[1])
    query = Places(slot, index + jnp.reshape(first_length, (-1, 1)), group)
    if cached is None:
        return query, query
    rows = jnp.arange(len(cached))[:, None]

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows, slot].set(new, mode="drop")

    # A picture is never cut: what sees itself both ways is among the new tokens.
    return query, Places(
        jnp.arange(cached.shape[1])[None], write(cached, query.index), write(jnp.zeros_like(cached), group)
    )


def check_masks(implementation: Implementation) -> None:
    """Raises UserError for a forced implementation that cannot mask as ``sees`` does; the others run as ``xla``."""
    if implementation in ("splash", "cudnn"):
        raise UserError(
            f"{implementation} attention has no masks for pictures that see themselves both ways or for windows of "
            "some layers: use implementation='xla'"
        )


@jax.named_scope("attention")
def attend_places(
    q: jax.Array, k: KeysOrValues, v: KeysOrValues, query: Places, key: Places, window: jax.Array | int
) -> jax.Array:
    """Attention to what ``sees`` shows, with the softmax in float32.

    Args:
      q: (B, T, N, H).
      k, v: (B, K, C, H).
      window: () int32, keys that a query sees, its own included, by ``index``; ``EVERYTHING`` is all.

    Returns:
      (B, T, N, H), dtype of q. Rows of padding queries are finite and meaningless.
    """
    # A padding query sees at least itself. Valid ones see no padding: it stands behind them, in no picture.
    return attend_masked(q, k, v, lambda start, stop: sees(query.between(start, stop), key, window))
