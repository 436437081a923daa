"""Flash attention on TPUs: the Pallas kernel "splash" that ships with JAX, on the devices of a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pdrop_jax.sharding import partition

SPLASH_BLOCK = 128  # the kernel's smallest block of keys: other lengths are padded for it alone
LONGEST_BLOCK = 1024  # queries that the kernel takes at once; they need no padding


def splash_causal(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, interpret: bool = False
) -> jax.Array:
    N = q.shape[2]
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(_local, window=window, interpret=interpret)
    if mesh.empty:
        return local(q, k, v)
    # The compiler cannot shard a kernel: each device is given its rows and heads. Key-value heads that cannot be
    # sharded are repeated, so that every device has those of its queries.
    spec = partition(("batch", None, "heads", None), q.shape, mesh)
    if partition(("batch", None, "heads", None), k.shape, mesh) != spec:
        k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    return jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(q, k, v)


def _local(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    # From valid queries the causal mask hides all padding, the buffer's and the kernel's.
    S = q.shape[1]
    keys = S + -S % SPLASH_BLOCK
    shape = (S if S <= LONGEST_BLOCK else keys, keys)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), offset=0)
    return _run_kernel(mask, q, k, v, interpret)


def splash_two_way(
    q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array | None = None, interpret: bool = False
) -> jax.Array:
    """Without ``segment`` every token sees every other: all are of one."""
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(_two_way_local, interpret=interpret)
    segment = jnp.zeros(q.shape[:2], jnp.int32) if segment is None else segment
    if mesh.empty:
        return local(q, k, v, segment)
    rows = partition(("rows", None, None, None), q.shape, mesh)
    specs = (rows, rows, rows, jax.sharding.PartitionSpec(*rows[:1]))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(q, k, v, segment)


def _two_way_local(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    # Blocks of 256 keys at least: the grid of 128 x 128 has four times as many steps, each with a cost of its own.
    padding = -q.shape[1] % (2 * SPLASH_BLOCK)
    segment = jnp.pad(segment, [(0, 0), (0, padding)], constant_values=-1)
    mask = masks.FullMask((segment.shape[1],) * 2)
    return _run_kernel(mask, q, k, v, interpret, splash.SegmentIds(segment, segment))


def _run_kernel(mask: Any, q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool, *segments: Any) -> jax.Array:
    """The kernel of ``mask`` on operands that are padded to its shape."""
    T, N, H = q.shape[1:]
    queries, keys = mask.shape
    q = q * H**-0.5  # the kernel does not scale
    q, k, v = (_padded(x, slots).swapaxes(1, 2) for x, slots in ((q, queries), (k, keys), (v, keys)))
    return jax.vmap(_kernel(N, mask, interpret))(q, k, v, *segments)[:, :, :T].swapaxes(1, 2)


def _kernel(num_heads: int, mask: Any, interpret: bool) -> Any:
    """The kernel for a static ``mask`` (queries, keys). Its type is private."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys = mask.shape
    block_kv = max(size for size in (512, 256, 128) if keys % size == 0)
    block_q = queries if queries <= LONGEST_BLOCK else block_kv
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    heads = masks.MultiHeadMask([mask] * num_heads)
    return splash.make_splash_mha_single_device(heads, block_sizes=blocks, interpret=interpret)


def _padded(x: jax.Array, slots: int) -> jax.Array:
    """``x`` (B, S, N, H) with zeros up to ``slots``, through a product with the identity, which is exact.

    XLA for TPUs fuses a pad into the operand of a matrix product but runs it alone beside anything else, which takes
    twice as long by the compiler's estimate.
    """
    S, H = x.shape[1], x.shape[3]
    if slots == S:
        return x
    x = jnp.pad(x, [(0, 0), (0, slots - S), (0, 0), (0, 0)])
    return jnp.tensordot(x, jnp.eye(H, dtype=x.dtype), axes=1, precision="highest")
