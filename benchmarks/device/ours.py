"""Our prefill, decode and training step. Each part yields rows of figures."""

import argparse
import functools
import time
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.limits import seconds_of, spread
from benchmarks.device.rows import DENSE, DROPS, INT8, Row
from benchmarks.device.shapes import (
    CAPACITY,
    GROUPS,
    LAYERS_STEP,
    STEPS,
    Shape,
    configure,
    inference_layers,
    most_layers,
    reason,
    shape_of,
    targets,
    training_batch,
)
from benchmarks.inference import GREEDY, NEVER, make_batch
from pdrop_jax.analysis.cost import decode_macs, prefill_macs, training_macs
from pdrop_jax.config import LlavaConfig
from pdrop_jax.generation.engine import decode, start
from pdrop_jax.generation.pretrained import arrange
from pdrop_jax.model.cache import cache_bytes
from pdrop_jax.model.params import Params, ParamSpec, param_specs, path_name
from pdrop_jax.model.quantization import quantize_decoder

USABLE = 0.92  # share of the device's memory that a training step may fill, by the compiler's own count


def inference(options: argparse.Namespace) -> Iterator[Row]:
    """Prefill and decode in bfloat16, dense and with drops, for each batch size."""
    shape = shape_of(options)
    layers = inference_layers(shape, options.memory)
    for model in (DENSE, DROPS, *(INT8 if options.int8 else ())):
        config = configure(shape, model, layers)
        params = draw(config, "bfloat16")
        if model in INT8:
            params = jax.jit(functools.partial(quantize_decoder, config), donate_argnums=0)(params)
        params = arrange(config, params)
        for rows in options.batches:
            common = {"part": "inference", "model": model, "batch": rows, "layers": layers}
            try:
                yield from ({**common, **row} for row in _time_inference(shape, config, params, rows, options.repeats))
            except RuntimeError as error:
                yield from ({**common, "program": name, "error": reason(error)} for name in ("prefill", "decode"))
        del params


_random = jax.jit(ParamSpec.random, static_argnums=(0, 2))  # jitted, so that only the result is ever in memory


def draw(config: LlavaConfig, dtype: str) -> Params:
    """Random weights, made on the device."""

    def one(path: tuple, spec: ParamSpec) -> jax.Array:
        return _random(spec, jax.random.key(zlib.crc32(path_name(path).encode())), dtype)

    return jax.tree.map_with_path(one, param_specs(config))


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
        seconds, (state, *_) = seconds_of(prefill_program, params, batch, key, sampler, stop)
        prefills.append(seconds)
        cached = cache_bytes(state.model.caches)
        seconds, _ = seconds_of(decode_program, params, state, until, sampler, stop)
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


def _initial(config: LlavaConfig) -> Any:
    from pdrop_jax.train.step import init_state

    return init_state(config, draw(config, "float32"), GROUPS, _optimizer(config), jnp.bfloat16)


def _time_training(shape: Shape, config: LlavaConfig, rows: int, repeats: int) -> Row:
    state = _initial(config)
    began = time.perf_counter()
    program, batch = _compile_step(shape, config, rows, state)
    compiled = time.perf_counter()
    changing = _size((state.trained, state.optimizer))

    def run(state: Any) -> Any:
        for _ in range(STEPS):
            state, _ = program(state, batch)
        return state

    times = []
    for _ in range(repeats + 1):
        seconds, state = seconds_of(run, state)
        times.append(seconds / STEPS)
    return {
        "seconds": spread(times[1:]),
        "flops": 2 * rows * training_macs(config, shape.bucket, targets(shape.bucket), GROUPS),
        "bytes": 2 * changing,  # read and written
        "compile_seconds": compiled - began,
        "memory_bytes": _memory(program),
    }
