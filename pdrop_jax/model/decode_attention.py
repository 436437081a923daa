"""A decode step: one new token of each row attends to a cache of those before it, and to itself.

Two orders give the same. A list of layers writes the token's key and value into the cache before each layer attends.
A scanned stack attends first and has the token's own beside the cache (``own``); they are written behind the last layer
of a stage, for all layers at once: written by each layer, they would cost a TPU more time than the attention. In a list
XLA for CPUs would copy the cache between reading and writing it.
"""

import functools

import jax
import jax.numpy as jnp

from pdrop_jax.model.attention import cache_logits, weighted_values
from pdrop_jax.model.cache import StageCache
from pdrop_jax.sharding import platform

MATRIX_ROWS = 8  # queries of a head with which XLA takes a TPU's matrix unit
LANES = 128  # numbers in a row of a TPU's registers
READ_SIZES = 4
LEAST_READ = 256  # slots: with fewer, reading costs less than choosing


def seen_slots(slot: jax.Array, slots: int, window: int | None = None) -> jax.Array:
    """What a token that goes to ``slot`` (B,) sees of a cache, itself included, (B, C) bool."""
    key = jnp.arange(slots)
    seen = key <= slot[:, None]
    return seen if window is None else seen & (key > slot[:, None] - window)


def read_sizes(slots: int) -> list[int]:
    """How many slots of a cache a step may read, ascending: a program reads at fixed places, so there are few sizes.

    On a GPU all are read: XLA makes such a choice on the host there, once in every layer.
    """
    if platform() == "gpu":
        return [slots]
    part = max(LEAST_READ, -(-slots // (READ_SIZES * LANES)) * LANES)
    return [*range(part, slots, part), slots]


@jax.named_scope("attention")
def attend_token(
    q: jax.Array,
    cache: StageCache,
    layer: jax.Array | int,
    slot: jax.Array,
    seen: jax.Array,
    own: StageCache | None = None,
) -> jax.Array:
    """Attention of one new token of each row.

    Args:
      q: (B, 1, N, H).
      slot: (B,) int32, the slot of a row's token, at most C. What is read goes by the largest, also of a row that is
        done while others go on.
      seen: (B, C) bool, which slots of the cache the token sees, its own included.
      own: key and value (B, 1, K, H) of the token if the cache does not hold them yet: see
        ``cache.write_in_all_layers``.

    Returns:
      (B, 1, N, H), dtype of q.
    """
    if own is not None:
        seen &= jnp.arange(cache.slots) != slot[:, None]
    sizes = read_sizes(cache.slots)
    branches = [functools.partial(_attend, layer=layer, slots=size) for size in sizes]
    last = slot.max() - (own is not None)
    number = (last >= jnp.array(sizes[:-1], jnp.int32)).sum()
    return jax.lax.switch(number, branches, q, cache, seen, own)


def _attend(
    q: jax.Array, cache: StageCache, seen: jax.Array, own: StageCache | None, *, layer: jax.Array | int, slots: int
) -> jax.Array:
    """``attend_token`` to the first ``slots`` slots of the cache."""
    B, _, N, H = q.shape
    one = jax.tree.map(lambda x: x[layer, :, :, :slots], cache)
    K = jax.tree.leaves(one.k)[0].shape[1]
    rows = _matrix_rows(q.reshape(B, K, N // K, H))
    logits = jnp.where(seen[:, None, None, :slots], cache_logits(rows, one.k), -jnp.inf)
    if own is None:
        out = weighted_values(jax.nn.softmax(logits, axis=-1), one.v, q.dtype, q.dtype)
    else:
        own = jax.tree.map(lambda x: x.swapaxes(1, 2), own)
        own_logit = cache_logits(rows, own.k)
        highest = jnp.maximum(logits.max(-1, keepdims=True), own_logit)
        weights, own_weight = jnp.exp(logits - highest), jnp.exp(own_logit - highest)
        total = weights.sum(-1, keepdims=True) + own_weight
        out = weighted_values(weights / total, one.v, q.dtype, jnp.float32)
        out += weighted_values(own_weight / total, own.v, q.dtype, jnp.float32)
    return out.astype(q.dtype)[:, :, : N // K].reshape(B, 1, N, H)


def _matrix_rows(x: jax.Array) -> jax.Array:
    """``x`` (B, K, Q, ...), on a TPU with at least 8 rows Q.

    XLA computes products of fewer rows on the vector unit, by its own estimate in two to three times the cycles of
    eight rows on the matrix unit.
    """
    if platform() != "tpu" or x.shape[2] >= MATRIX_ROWS:
        return x
    return jax.lax.optimization_barrier(jnp.pad(x, [(0, 0), (0, 0), (0, MATRIX_ROWS - x.shape[2]), (0, 0)]))
