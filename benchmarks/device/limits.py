"""What the device can do: its bfloat16 matrix product and its copy. Needs nothing but jax."""

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

LARGE, TINY = (8192, 2**30), (256, 2**20)  # edge of the matrices, bytes of the copied array
LOOPS = 8  # products or copies within one call, so that starting it costs nothing in comparison


def limits(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The device, and how fast it multiplies bfloat16 matrices and copies memory."""
    device, (edge, copied) = jax.devices()[0], TINY if options.shape == "tiny" else LARGE
    memory = (device.memory_stats() or {}).get("bytes_limit")
    # Random numbers: constant matrices take less power, so that a GPU multiplies them at a higher clock.
    matrix = jax.random.normal(jax.random.key(0), (edge, edge), jnp.bfloat16) / edge**0.5
    array = jax.random.normal(jax.random.key(1), (copied // 2,), jnp.bfloat16)
    products = jax.jit(lambda x, y: jax.lax.fori_loop(0, LOOPS, lambda _, x: x @ y, x))
    # Each pass adds another number, or the compiler could merge the passes into one.
    copies = jax.jit(lambda x: jax.lax.fori_loop(0, LOOPS, lambda n, x: x + n.astype(x.dtype), x))
    flops = [2 * LOOPS * edge**3 / s for s in repeat(products, matrix, matrix, repeats=options.repeats)]
    moved = [2 * LOOPS * array.nbytes / s for s in repeat(copies, array, repeats=options.repeats)]
    yield {
        "part": "limits",
        "device": device.device_kind,
        "platform": jax.default_backend(),
        "memory_bytes": memory,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "torch", "transformers")},
        "matrix_edge": edge,
        "copied_bytes": copied,
        "flops_per_second": spread(flops),
        "bytes_per_second": spread(moved),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def repeat(function: Callable[..., Any], *arguments: Any, repeats: int) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    return [seconds_of(function, *arguments)[0] for _ in range(repeats + 1)][1:]


def seconds_of(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call until its result is there, and the result."""
    began = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began, result


def spread(figures: list[float]) -> dict[str, float]:
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}
