"""KV caches: one for each stage, since each stage sees its own tokens.

With ``TextConfig.cache_dtype`` a head's key or value of a token is quantized once, when it is computed, with a scale of
its own. Whatever attends to it or is ranked by it sees the quantized values, in a prefill too: a token decoded and the
same token in a longer prompt are alike. A stream's keys are quantized once more when a question rotates them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pdrop_jax.config import CacheDtype, LlavaConfig
from pdrop_jax.model.quantization import quantize_along, stored_bytes
from pdrop_jax.sharding import constrain, partition, platform

TILE = 16  # slots of a bfloat16 tile of a TPU's memory
AXES = ("batch", "heads", None, None)  # logical axes of a layer's keys and values (B, K, C, H), and scales (B, K, C)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Quantized:
    """Keys or values as integers with a scale for each vector: (..., H) int8 or int4, and (...) float32."""

    qvalue: jax.Array
    scale: jax.Array


KeysOrValues = jax.Array | Quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StageCache:
    """Keys and values of a stage's layers.

    Attributes:
      k: (L_s, B, K, C, H), rotated keys; C slots hold a row's tokens of the stage, then its new ones. Slots are next
        to H so that decoding reads a head's keys as the matrix that they are, without a transposed copy.
      v: (L_s, B, K, C, H).
    """

    k: KeysOrValues
    v: KeysOrValues

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[3]

    def layer(self, n: jax.Array | int) -> tuple[KeysOrValues, KeysOrValues]:
        """Keys and values (B, K, C, H) of the stage's n-th layer."""
        one = jax.tree.map(lambda x: x[n], self)
        return one.k, one.v


def as_cached(x: jax.Array, dtype: CacheDtype | None) -> KeysOrValues:
    """Keys or values (..., H) as a cache holds them."""
    if dtype is None:
        return x
    qvalue, scale = quantize_along(x, jnp.iinfo(dtype).bits, [-1])
    return Quantized(qvalue, scale[..., 0])


def restored(x: KeysOrValues, dtype: DTypeLike) -> jax.Array:
    """The values (..., H) of what ``as_cached`` returns, in ``dtype``."""
    return (x.qvalue.astype(jnp.float32) * x.scale[..., None]).astype(dtype) if isinstance(x, Quantized) else x


@jax.named_scope("attention")
def cache_prompt(k: KeysOrValues, v: KeysOrValues, new_slots: int) -> StageCache:
    """The cache of one layer, without the leading L_s, from the keys and values (B, S, K, H) of a whole buffer."""

    def pad(x: jax.Array) -> jax.Array:
        x = x.swapaxes(1, 2)
        x = jnp.pad(x, [(0, new_slots if axis == 2 else 0) for axis in range(x.ndim)])
        return constrain(x, *AXES[: x.ndim])

    return jax.tree.map(pad, StageCache(k, v))


def empty_caches(config: LlavaConfig, rows: int, dtype: DTypeLike) -> tuple[StageCache | None, ...]:
    """A cache without slots for each stage, None for a stage without layers; see ``grow``."""
    text = config.text
    counts = (stop - start for start, stop in config.schedule.layer_ranges(text.num_layers))
    empty = (jnp.zeros((n, rows, text.num_kv_heads, 0, text.head_dim), dtype) for n in counts)

    def stored(x: jax.Array) -> KeysOrValues:
        if text.cache_dtype is None:
            return x
        return Quantized(x.astype(text.cache_dtype), x[..., 0].astype(jnp.float32))

    return tuple(StageCache(stored(x), stored(x)) if len(x) else None for x in empty)


def grow(cache: StageCache, slots: int) -> StageCache:
    """``cache`` enlarged to ``slots`` slots."""

    def pad(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, slots - x.shape[3] if axis == 3 else 0) for axis in range(x.ndim)])
        return constrain(x, None, *AXES[: x.ndim - 1])

    return jax.tree.map(pad, cache)


@jax.named_scope("attention")
def write_tokens(
    cache: StageCache, layer: jax.Array | int, k: KeysOrValues, v: KeysOrValues, first: jax.Array
) -> StageCache:
    """Writes keys and values (B, T, K, H) of new tokens into the slots from ``first`` (B,) on.

    What would go past the last slot is left out: a chunk's padding may reach there.
    """
    layer, rows = jnp.asarray(layer), jnp.arange(first.shape[0])[:, None]
    slots = first[:, None] + jnp.arange(jax.tree.leaves(k)[0].shape[1])  # (B, T)
    return jax.tree.map(lambda old, new: old.at[layer, rows, :, slots].set(new, mode="drop"), cache, StageCache(k, v))


@jax.named_scope("attention")
def write_in_all_layers(cache: StageCache, new: StageCache, slot: jax.Array) -> StageCache:
    """Writes one new token of each row into its ``slot`` (B,) of all layers, unless that is past the last.

    Args:
      new: keys and values (L_s, B, 1, K, H).
    """
    if platform() != "tpu":
        return scatter_token(cache, new, slot)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return write_in_tiles(cache, new, slot)

    def specs(tree: StageCache, *axes: str | None) -> Any:
        return jax.tree.map(lambda x: partition((*axes, None)[: x.ndim], x.shape, mesh), tree)

    # The compiler would gather rows to loop over them: each device loops over its own.
    caches = specs(cache, None, *AXES)
    news, rows = specs(new, None, "batch", None, "heads"), partition(AXES[:1], slot.shape, mesh)
    write = jax.shard_map(write_in_tiles, mesh=mesh, in_specs=(caches, news, rows), out_specs=caches, check_vma=False)
    return write(cache, new, slot)


def write_slots(
    cache: StageCache, layer: jax.Array | int, k: KeysOrValues, v: KeysOrValues, slots: jax.Array
) -> StageCache:
    """``write_tokens`` for slots (B, T) that are in no order."""
    rows, layer = jnp.arange(len(slots))[:, None], jnp.asarray(layer)
    return jax.tree.map(lambda old, new: old.at[layer, rows, :, slots].set(new), cache, StageCache(k, v))


def scatter_token(cache: StageCache, new: StageCache, slot: jax.Array) -> StageCache:
    """``write_in_all_layers`` on CPUs and GPUs."""

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[:, jnp.arange(len(slot)), :, slot].set(new[:, :, 0].swapaxes(0, 1), mode="drop")

    return jax.tree.map(write, cache, new)


def write_in_tiles(cache: StageCache, new: StageCache, slot: jax.Array) -> StageCache:
    """Same as ``scatter_token``, for TPUs: reads, changes and writes the memory tiles that hold a row's slot.

    For a scatter, and for slices of a single slot, XLA wants heads next to H and copies all caches into that layout and
    back in each call of ``engine.decode``. Selecting among all slots, as an alternative, writes the whole cache.
    """
    C = cache.slots
    size = min(TILE, C)
    new = jax.tree.map(lambda x: x.swapaxes(2, 3), new)  # (L_s, B, K, 1, ...)

    def write_row(b: jax.Array, cache: StageCache) -> StageCache:
        begin = jnp.minimum(slot[b] // size * size, C - size)

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            (L, _, K), rest = old.shape[:3], old.shape[4:]
            at: list[Any] = [0, b, 0, begin, *(0 for _ in rest)]
            tile = jax.lax.dynamic_slice(old, at, (L, 1, K, size, *rest))
            token = jax.lax.dynamic_index_in_dim(new, b, axis=1)
            chosen = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 3) == slot[b] - begin
            return jax.lax.dynamic_update_slice(old, jnp.where(chosen, token, tile), at)

        return jax.tree.map(write, cache, new)

    return jax.lax.fori_loop(0, len(slot), write_row, cache)


def cache_bytes(caches: Sequence[StageCache | None]) -> int:
    return stored_bytes(caches)
