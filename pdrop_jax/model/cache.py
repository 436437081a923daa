"""KV caches: one for each stage, since each stage sees tokens of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pdrop_jax.config import TextConfig
from pdrop_jax.schedule import Stage
from pdrop_jax.sharding import constrain


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


def init_caches(
    config: TextConfig, plan: Sequence[Stage], batch: int, new_slots: int, dtype: Any
) -> tuple[StageCache, ...]:
    """Empty caches with ``new_slots`` slots behind each stage's buffer."""

    def zeros(stage: Stage) -> jax.Array:
        shape = (stage.num_layers, batch, config.num_kv_heads, stage.slots + new_slots, config.head_dim)
        return constrain(jnp.zeros(shape, dtype), None, "batch", "heads", None, None)

    return tuple(StageCache(zeros(stage), zeros(stage)) for stage in plan)


def write_prompt(cache: StageCache, layer: jax.Array | int, k: jax.Array, v: jax.Array) -> StageCache:
    """Keys and values (B, S, K, H) of a whole buffer into the first slots of ``layer``."""

    def put(stack: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(stack, x.swapaxes(1, 2)[None].astype(stack.dtype), (layer, 0, 0, 0, 0))

    return StageCache(put(cache.k, k), put(cache.v, v))


def write_token(cache: StageCache, layer: jax.Array | int, k: jax.Array, v: jax.Array, slot: jax.Array) -> StageCache:
    """Key and value (B, 1, K, H) of one new token into ``slot`` (B,) of each row; padding there is overwritten."""
    rows = jnp.arange(slot.shape[0])
    return StageCache(cache.k.at[layer, rows, :, slot].set(k[:, 0]), cache.v.at[layer, rows, :, slot].set(v[:, 0]))


def cache_bytes(caches: Sequence[StageCache]) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
