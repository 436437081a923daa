"""KV caches: one for each stage, since each stage sees tokens of its own."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pdrop_jax.sharding import constrain, explicit


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StageCache:
    """Keys and values of a stage's layers.

    Attributes:
      k: (L_s, B, K, C, H), rotated keys; C slots hold the stage's tokens and then the new ones of each row. Slots
        stand next to H so that decoding reads a head's keys as the matrix they are, without a transposed copy.
      v: (L_s, B, K, C, H).
    """

    k: jax.Array
    v: jax.Array


def cache_prompt(k: jax.Array, v: jax.Array, new_slots: int) -> StageCache:
    """One layer's cache, without the leading L_s, of the keys and values (B, S, K, H) of a whole buffer."""

    def pad(x: jax.Array) -> jax.Array:
        x = jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, new_slots), (0, 0)])
        return constrain(x, "batch", "heads", None, None)

    return StageCache(pad(k), pad(v))


def write_token(cache: StageCache, layer: jax.Array | int, k: jax.Array, v: jax.Array, slot: jax.Array) -> StageCache:
    """Key and value (B, 1, K, H) of one new token into ``slot`` (B,) of each row; padding there is overwritten."""
    rows = jnp.arange(slot.shape[0])
    cut = explicit(cache.k.shape, None, "batch", "heads", None, None)
    return StageCache(
        *(old.at[layer, rows, :, slot].set(new[:, 0], out_sharding=cut) for old, new in ((cache.k, k), (cache.v, v)))
    )


def cache_bytes(caches: Sequence[StageCache | None]) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
