"""KV caches: one for each stage, since each stage sees its own tokens."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pdrop_jax.config import LlavaConfig
from pdrop_jax.sharding import constrain

AXES = ("batch", "heads", None, None)  # logical axes of a layer's keys and values (B, K, C, H)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StageCache:
    """Keys and values of a stage's layers.

    Attributes:
      k: (L_s, B, K, C, H), rotated keys; C slots hold a row's tokens of the stage, then its new ones. Slots are next
        to H so that decoding reads a head's keys as the matrix that they are, without a transposed copy.
      v: (L_s, B, K, C, H).
    """

    k: jax.Array
    v: jax.Array


@jax.named_scope("attention")
def cache_prompt(k: jax.Array, v: jax.Array, new_slots: int) -> StageCache:
    """The cache of one layer, without the leading L_s, from the keys and values (B, S, K, H) of a whole buffer."""

    def pad(x: jax.Array) -> jax.Array:
        x = jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, new_slots), (0, 0)])
        return constrain(x, *AXES)

    return StageCache(pad(k), pad(v))


def empty_caches(config: LlavaConfig, rows: int, dtype: DTypeLike) -> tuple[StageCache | None, ...]:
    """A cache without slots for each stage, None for a stage without layers; see ``grow``."""
    text = config.text
    counts = (stop - start for start, stop in config.schedule.layer_ranges(text.num_layers))
    empty = (jnp.zeros((n, rows, text.num_kv_heads, 0, text.head_dim), dtype) for n in counts)
    return tuple(StageCache(x, x) if len(x) else None for x in empty)


def grow(cache: StageCache, slots: int) -> StageCache:
    """``cache`` enlarged to ``slots`` slots."""

    def pad(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, slots - x.shape[3]), (0, 0)])
        return constrain(x, None, *AXES)

    return StageCache(pad(cache.k), pad(cache.v))


@jax.named_scope("attention")
def write_tokens(cache: StageCache, layer: jax.Array | int, k: jax.Array, v: jax.Array, first: jax.Array) -> StageCache:
    """Writes keys and values (B, T, K, H) of new tokens into the slots from ``first`` (B,) on.

    What would go past the last slot is left out: a chunk's padding may reach there.
    """
    write = scatter_tokens
    if k.shape[1] == 1:
        write = functools.partial(jax.lax.platform_dependent, tpu=select_tokens, default=scatter_tokens)
    layer = jnp.asarray(layer)
    return StageCache(write(cache.k, layer, k, first), write(cache.v, layer, v, first))


def write_slots(cache: StageCache, layer: jax.Array | int, k: jax.Array, v: jax.Array, slots: jax.Array) -> StageCache:
    """``write_tokens`` for slots (B, T) that are in no order."""
    rows, layer = jnp.arange(len(slots))[:, None], jnp.asarray(layer)
    return StageCache(cache.k.at[layer, rows, :, slots].set(k), cache.v.at[layer, rows, :, slots].set(v))


def scatter_tokens(old: jax.Array, layer: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """``old`` (L_s, B, K, C, H) with ``new`` (B, T, K, H) in one layer's slots from ``first`` (B,) on."""
    rows = jnp.arange(first.shape[0])[:, None]
    slots = first[:, None] + jnp.arange(new.shape[1])  # (B, T)
    return old.at[layer, rows, :, slots].set(new, mode="drop")


def select_tokens(old: jax.Array, layer: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """Same as ``scatter_tokens`` for a single token, T = 1.

    It writes the whole layer, which is slower on a CPU. For a scatter XLA for TPUs wants heads next to H, however, and
    would copy all caches into that layout and back in each call of ``engine.decode``.
    """
    chosen = (jnp.arange(old.shape[3]) == first[:, None])[:, None, :, None]  # (B, 1, C, 1)
    updated = jnp.where(chosen, new.swapaxes(1, 2), old[layer])
    return jax.lax.dynamic_update_index_in_dim(old, updated, layer, 0)


def cache_bytes(caches: Sequence[StageCache | None]) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
