"""The device's limits, and our prefill, decode and training step beside them. Each part yields rows of figures."""

import argparse
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.shapes import (
    CAPACITY,
    DENSE,
    DROPS,
    GROUPS,
    LAYERS_STEP,
    Row,
    Shape,
    configure,
    inference_layers,
    most_layers,
    reason,
    shape_of,
    spread,
    targets,
    training_batch,
)
from benchmarks.inference import GREEDY, NEVER, make_batch
from pdrop_jax.analysis.cost import decode_macs, prefill_macs, training_macs
from pdrop_jax.config import LlavaConfig
from pdrop_jax.generation.engine import decode, start
from pdrop_jax.model.cache import cache_bytes
from pdrop_jax.model.params import Params, init_params
from pdrop_jax.model.stacking import unstack

LOOPS = 8  # products or copies within one call, so that starting it costs nothing in comparison
USABLE = 0.92  # share of the device's memory that a training step may fill, by the compiler's own count


def limits(options: argparse.Namespace) -> Iterator[Row]:
    """The device, and how fast it multiplies bfloat16 matrices and copies memory."""
    shape, device = shape_of(options), jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    # Random numbers: constant matrices take less power, so that a GPU multiplies them at a higher clock.
    matrix = jax.random.normal(jax.random.key(0), (shape.edge, shape.edge), jnp.bfloat16) / shape.edge**0.5
    array = jax.random.normal(jax.random.key(1), (shape.copied // 2,), jnp.bfloat16)
    products = jax.jit(lambda x, y: jax.lax.fori_loop(0, LOOPS, lambda _, x: x @ y, x))
    # Each pass adds another number, or the compiler could merge the passes into one.
    copies = jax.jit(lambda x: jax.lax.fori_loop(0, LOOPS, lambda n, x: x + n.astype(x.dtype), x))
    flops = [2 * LOOPS * shape.edge**3 / s for s in repeat(lambda: products(matrix, matrix), options.repeats)]
    moved = [2 * LOOPS * array.nbytes / s for s in repeat(lambda: copies(array), options.repeats)]
    yield {
        "part": "limits",
        "device": device.device_kind,
        "platform": jax.default_backend(),
        "memory_bytes": memory,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "torch", "transformers")},
        "matrix_edge": shape.edge,
        "copied_bytes": shape.copied,
        "flops_per_second": spread(flops),
        "bytes_per_second": spread(moved),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def repeat(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    return [_seconds(call)[0] for _ in range(repeats + 1)][1:]


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


def inference(options: argparse.Namespace) -> Iterator[Row]:
    """Prefill and decode in bfloat16, dense and with drops, for each batch size."""
    shape = shape_of(options)
    layers = inference_layers(shape, options.memory)
    for model in (DENSE, DROPS):
        config = configure(shape, model, layers)
        params = _draw(config, "bfloat16")
        for rows in options.batches:
            common = {"part": "inference", "model": model, "batch": rows, "layers": layers}
            try:
                yield from ({**common, **row} for row in _time_inference(shape, config, params, rows, options.repeats))
            except RuntimeError as error:
                yield from ({**common, "program": name, "error": reason(error)} for name in ("prefill", "decode"))
        del params


@functools.partial(jax.jit, static_argnums=(0, 1))  # jitted, so that no array exists in float32
def _draw(config: LlavaConfig, dtype: str) -> Params:
    """Random weights on the device; on a CPU every layer apart, as ``pdrop_jax.load`` has them there."""
    params = init_params(config, dtype=dtype)
    return unstack(params) if jax.default_backend() == "cpu" else params


def _time_inference(shape: Shape, config: LlavaConfig, params: Params, rows: int, repeats: int) -> list[Row]:
    batch, key, sampler, stop, until = jax.device_put(
        (make_batch(config, shape.bucket, rows), jax.random.key(0), GREEDY, NEVER, np.int32(shape.new_tokens))
    )
    began = time.perf_counter()
    prefill_program = start.lower(config, params, batch, key, sampler, stop, capacity=CAPACITY).compile()
    prefill_compiled = time.perf_counter()
    abstract, *_ = start.eval_shape(config, params, batch, key, sampler, stop, capacity=CAPACITY)
    decode_program = decode.lower(config, params, abstract, until, sampler, stop).compile()
    decode_compiled = time.perf_counter()
    prefills, tokens = [], []
    for _ in range(repeats + 1):
        seconds, (state, *_) = _seconds(lambda: prefill_program(params, batch, key, sampler, stop))
        prefills.append(seconds)
        cached = cache_bytes(state.model.caches)
        seconds, _ = _seconds(lambda: decode_program(params, state, until, sampler, stop))  # noqa: B023
        tokens.append(seconds / (shape.new_tokens - 1))
        del state  # its arrays were donated
    read = {name: tree for name, tree in params.items() if name in ("stages", "norm", "head")}
    rest = {name: tree for name, tree in params.items() if name in ("vision", "projector")}
    return [
        {
            "program": "prefill",
            "seconds": spread(prefills[1:]),
            "flops": 2 * rows * prefill_macs(config, shape.bucket).total,
            "bytes": _size(read) + _size(rest) + cached,
            "compile_seconds": prefill_compiled - began,
            "memory_bytes": _memory(prefill_program),
        },
        {
            "program": "decode",
            "seconds": spread(tokens[1:]),
            "flops": 2 * rows * decode_macs(config, shape.bucket),
            "bytes": _size(read) + cached,
            "compile_seconds": decode_compiled - prefill_compiled,
            "memory_bytes": _memory(decode_program),
        },
    ]


def _size(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _memory(program: Any) -> int | None:
    """Bytes that a compiled program needs on the device, arguments included; None if the platform does not say."""
    found = program.memory_analysis()
    if found is None:
        return None
    arguments = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return arguments + found.temp_size_in_bytes


def training(options: argparse.Namespace) -> Iterator[Row]:
    """A step that trains projector and decoder: float32 weights and moments, computed in bfloat16, remat "full"."""
    shape = shape_of(options)
    layers = shape.config.text.num_layers
    if options.memory is not None:
        # Memory is linear in the number of layers: two compilations give the line.
        few, more = (
            _memory(_compile_step(shape, configure(shape, DENSE, n), max(options.batches), None)[0]) or 0
            for n in (LAYERS_STEP, 2 * LAYERS_STEP)
        )
        slope = (more - few) / LAYERS_STEP
        layers = most_layers(shape, USABLE * options.memory, lambda n: few + slope * (n - LAYERS_STEP))
    for model in (DENSE, DROPS):
        config = configure(shape, model, layers)
        for rows in options.batches:
            common = {"part": "training", "program": "train step", "model": model, "batch": rows, "layers": layers}
            try:
                yield {**common, **_time_training(shape, config, rows, options.repeats)}
            except RuntimeError as error:
                yield {**common, "error": reason(error)}


def _compile_step(shape: Shape, config: LlavaConfig, rows: int, state: Any) -> tuple[Any, Any]:
    """The compiled step, and the batch on the device; without ``state`` the step of an abstract one."""
    from pdrop_jax.train.step import train_step

    batch = jax.device_put(training_batch(shape, rows))
    state = jax.eval_shape(lambda: _initial(config)) if state is None else state
    return train_step.lower(config, _optimizer(config), state, batch, dtype=jnp.bfloat16, remat="full").compile(), batch


def _optimizer(config: LlavaConfig) -> Any:
    from pdrop_jax.train.optimizer import make_optimizer
    from pdrop_jax.train.recipe import OptimizerRecipe

    return make_optimizer(config, OptimizerRecipe(), 1000)


@functools.partial(jax.jit, static_argnums=0)
def _initial(config: LlavaConfig) -> Any:
    from pdrop_jax.train.step import init_state

    return init_state(config, _draw(config, "float32"), GROUPS, _optimizer(config), jnp.bfloat16)


def _time_training(shape: Shape, config: LlavaConfig, rows: int, repeats: int) -> Row:
    state = _initial(config)
    began = time.perf_counter()
    program, batch = _compile_step(shape, config, rows, state)
    compiled = time.perf_counter()
    changing = _size((state.trained, state.optimizer))
    times = []
    for _ in range(repeats + 1):
        seconds, (state, _) = _seconds(lambda: program(state, batch))  # noqa: B023
        times.append(seconds)
    return {
        "seconds": spread(times[1:]),
        "flops": 2 * rows * training_macs(config, shape.bucket, targets(shape.bucket), GROUPS),
        "bytes": 2 * changing,  # read and written
        "compile_seconds": compiled - began,
        "memory_bytes": _memory(program),
    }
