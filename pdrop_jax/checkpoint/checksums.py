"""Checksums of arrays: written beside them, compared when they are read."""

from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from pdrop_jax.errors import UserError

CHUNKS = 2**20, 2**14  # elements of a host array that are summed at a time, and for the remainder

Checksums = dict[str, int]
Stored = dict[str, Annotated[int, Field(ge=0, lt=2**32)]]  # ``Checksums`` in a file


def checksums(arrays: Mapping[str, Any]) -> Checksums:
    """An unsigned 32-bit number for each array: the sum of its words, each times an odd number of its own, mod 2^32.

    Changing a single word changes it, and so does swapping two words. Computed where the arrays are: on one CPU in
    chunks, compiled once for all shapes, elsewhere sharded as they are.
    """
    host = {name: _on_host(x) for name, x in arrays.items() if isinstance(x, np.ndarray) or _on_one_cpu(x)}
    device = {name: x for name, x in arrays.items() if name not in host}
    found = jax.device_get(_on_devices(device)) if device else {}
    return {name: host[name] if name in host else int(found[name]) for name in arrays}


def verify(arrays: Mapping[str, Any], expected: Checksums, where: str) -> None:
    """Raises UserError if ``arrays`` do not have the checksums ``expected``; ``where`` is for the message."""
    damaged = [name for name, value in checksums(arrays).items() if expected[name] != value]
    if damaged:
        raise UserError(f"{where} is damaged: the checksum of {damaged[0]} does not match; copy or convert it again")


def _on_one_cpu(x: jax.Array) -> bool:
    devices: list[Any] = list(x.sharding.device_set)
    return [device.platform for device in devices] == ["cpu"]


def _on_host(x: Any) -> int:
    # A view of the buffer: jax would keep a host copy with the array, which then could not be donated.
    flat = np.asarray(x if isinstance(x, np.ndarray) else x.addressable_data(0)).reshape(-1)
    total = start = 0
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        while start < flat.size:
            size = next((size for size in CHUNKS if size <= flat.size - start), CHUNKS[-1])
            chunk = flat[start : start + size]
            placed, plain = _sums(chunk if len(chunk) == size else np.pad(chunk, (0, size - len(chunk))))
            total += int(placed) + 2 * start * int(plain)
            start += size
    return total % 2**32


@jax.jit
def _on_devices(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _of_rows(x) for name, x in arrays.items()}


def _of_rows(x: jax.Array) -> jax.Array:
    placed, plain = _sums(jnp.atleast_1d(x))
    row = jnp.zeros(plain.shape, jnp.uint32)  # number of each row
    for axis, size in enumerate(plain.shape):
        row = row * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, plain.shape, axis)
    length = np.uint32(x.shape[-1]) if x.ndim else np.uint32(1)
    return (placed + 2 * length * row * plain).sum(dtype=jnp.uint32)


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each row along the last axis (uint32): the sum of its words times 1, 3, 5, …, and the sum of its words."""
    if x.dtype != jnp.bool_:
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    words = x.astype(jnp.uint32)
    odd = 2 * jax.lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1) + 1
    zero = np.uint32(0)
    # As one reduction of both, XLA needs no temporary of the size of x and is 20 times as fast as with two sums.
    return jax.lax.reduce((words * odd, words), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (x.ndim - 1,))
