"""Training step, prefill and decode, compiled from abstract shapes for TPU devices that need not exist."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pdrop_jax.analysis.cost import decode_macs, prefill_macs, training_macs
from pdrop_jax.batch import Batch, Bucket
from pdrop_jax.config import LlavaConfig, Quantization
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import State, decode, start
from pdrop_jax.generation.next_token import token_sampler
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.model import cache
from pdrop_jax.model.params import abstract_params
from pdrop_jax.model.placement import abstract
from pdrop_jax.model.quantization import quantize_decoder
from pdrop_jax.model.tiles import abstract_tiled
from pdrop_jax.planner.hlo import Report, compile_report
from pdrop_jax.sharding import batch_sharding, devices_along, make_mesh, partition
from pdrop_jax.train.optimizer import make_optimizer
from pdrop_jax.train.recipe import OptimizerRecipe
from pdrop_jax.train.step import compiler_options, init_state, train_step_with

GROUPS = ("projector", "llm")
QUERIES = 4  # query rows of a training example
CAPACITY = 128  # max_new_tokens
STEPS = 1000  # length of the training run; only the learning rate schedule depends on it
TENSOR = (1, 2, 4, 8)  # tensor axis sizes that ``suggest`` tries


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile, in bfloat16 with the attention of a TPU.

    Attributes:
      mode: "train" is one step of full fine-tuning with float32 master weights and moments.
      bucket: text slots and image tokens of each row.
      rows: global batch size.
      grad_accum_steps: microbatches per training step.
      groups: trained parameter groups, out of "vision", "compressor", "projector" and "llm".
      quantize: quantization of the decoder for inference, see ``model.quantization``.
    """

    config: LlavaConfig
    mode: Literal["train", "prefill", "decode"]
    bucket: Bucket
    rows: int
    grad_accum_steps: int = 1
    groups: tuple[str, ...] = GROUPS
    quantize: Quantization | None = None

    @property
    def macs(self) -> float:
        """MACs of all rows, computed from the config. Training assumes that half of the text tokens are targets."""
        if self.mode == "train":
            return self.rows * training_macs(self.config, self.bucket, self.bucket.text / 2, self.groups)
        if self.mode == "prefill":
            return self.rows * prefill_macs(self.config, self.bucket).total
        return self.rows * decode_macs(self.config, self.bucket)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A job on a mesh, with the compiler's report."""

    job: Program
    mesh: dict[str, int]
    report: Report

    @property
    def row_ms(self) -> float:
        """Estimated milliseconds per row of the batch; infinite if the program does not fit."""
        estimate = self.report.estimate
        return estimate.time.total / self.job.rows if estimate else math.inf


def groups_of(config: LlavaConfig) -> tuple[str, ...]:
    """Groups that full fine-tuning trains; LLaVA-NeXT, which tiles images, and LLaVA-UHD v4 also train the tower."""
    if config.vision.early_compression:
        return ("vision", "compressor", *GROUPS)
    return ("vision", *GROUPS) if config.tiling else GROUPS


def compile_program(
    job: Program, sizes: dict[str, int] | None, topology: str, devices: Sequence[jax.Device]
) -> CompiledProgram:
    """Compiles ``job`` for a mesh.

    Args:
      sizes: devices along each mesh axis; None puts all of them along fsdp.
      topology: topology of ``devices``, see ``topology.devices_of``.

    Raises:
      UserError: the mesh does not fit the devices, or the batch size is not divisible by its shards.
    """
    mesh = make_mesh(sizes, devices)
    parts = devices_along("batch", mesh) * (job.grad_accum_steps if job.mode == "train" else 1)
    if job.rows < 1 or job.rows % parts:
        raise UserError(f"a batch of {job.rows} rows is not divisible by {parts}: choose a multiple of {parts}")
    report = compile_report(lambda: lower(job, mesh), topology)
    return CompiledProgram(job=job, mesh=dict(mesh.shape), report=report)


def suggest(
    job: Program, devices: int, compiled: Callable[[Program, dict[str, int]], CompiledProgram]
) -> list[CompiledProgram]:
    """The ``fastest`` program for each fsdp x tensor mesh on which the job fits, sorted by the estimated time per row.

    Args:
      devices: number of devices of the slice.
      compiled: compiles a job on a mesh with the given axis sizes.
    """
    tensors = [tensor for tensor in TENSOR if devices % tensor == 0 and job.config.text.num_heads % tensor == 0]
    found = [fastest(job, {"fsdp": devices // tensor, "tensor": tensor}, compiled) for tensor in tensors]
    return sorted((x for x in found if x), key=lambda x: x.row_ms)


def fastest(
    job: Program, sizes: dict[str, int], compiled: Callable[[Program, dict[str, int]], CompiledProgram]
) -> CompiledProgram | None:
    """The program with the shortest estimated time per row on one mesh, None if none fits.

    A training batch keeps its size, and its number of microbatches is doubled until the step fits and then for as long
    as that makes it faster. An inference batch is doubled for as long as it fits and a row gets faster.
    """
    best = None
    for attempt in _attempts(job, sizes["fsdp"]):
        tried = compiled(attempt, sizes)
        if tried.report.fits and (best is None or tried.row_ms < best.row_ms):
            best = tried
        elif best or job.mode != "train":
            break
    return best


def _attempts(job: Program, shards: int) -> Iterator[Program]:
    """``job`` with 1, 2, 4, ... microbatches, or with doubling batch sizes, always divisible by ``shards``."""
    if job.mode == "train":
        grad_accum_steps = 1
        while job.rows % (shards * grad_accum_steps) == 0:
            yield dataclasses.replace(job, grad_accum_steps=grad_accum_steps)
            grad_accum_steps *= 2
        return
    rows = math.lcm(job.rows, shards)
    while True:
        yield dataclasses.replace(job, rows=rows)
        rows *= 2


def lower(job: Program, mesh: Mesh) -> Any:
    """Lowers ``job`` for the devices of ``mesh``."""
    config = job.config
    batch = abstract_batch(config, mesh, job.bucket, job.rows, training=job.mode == "train")
    program: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    if job.mode == "train":
        optimizer = make_optimizer(config, OptimizerRecipe(), STEPS)
        init = functools.partial(init_state, config, groups=job.groups, optimizer=optimizer, dtype=jnp.bfloat16)
        train_state = abstract(config, jax.eval_shape(init, abstract_params(config)), mesh)
        rows = job.rows // (devices_along("batch", mesh) * job.grad_accum_steps)
        program, arguments = train_step_with(compiler_options("tpu", rows)), (config, optimizer, train_state, batch)
        settings = {"grad_accum_steps": job.grad_accum_steps}
    else:
        params = abstract_params(config, jnp.bfloat16)
        if job.quantize:
            params = jax.eval_shape(functools.partial(quantize_decoder, config, quantization=job.quantize), params)
        params = abstract_tiled(config, abstract(config, params, mesh), mesh)
        greedy, stop = token_sampler(Sampling()), np.zeros(1, np.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        program, arguments = start, (config, params, batch, key, greedy, stop)
        settings = {"capacity": CAPACITY}
        if job.mode == "decode":
            with jax.set_mesh(mesh):
                state, *_ = start.eval_shape(*arguments, **settings)
            program, settings = decode, {}
            arguments = config, params, _state_placed(state, mesh), np.int32(CAPACITY), greedy, stop
    with jax.set_mesh(mesh):
        return program.lower(*arguments, **settings)


def abstract_batch(config: LlavaConfig, mesh: Mesh, bucket: Bucket, rows: int, training: bool) -> Batch:
    """Abstract batch of ``rows`` rows that fill ``bucket``, sharded over the mesh by rows."""
    where = batch_sharding(mesh, rows)

    def leaf(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

    S, T = bucket.slots, config.features_per_token
    crop, layout = config.vision.crop_shape, config.vision.layout_values
    return Batch(
        token_ids=leaf(S),
        feature_index=leaf(S, T),
        image_id=leaf(S),
        length=leaf(),
        crops=leaf(bucket.crops, *crop, dtype=jnp.float32),
        query_rows=leaf(QUERIES if training else 1),
        labels=leaf(S) if training else None,
        bucket=bucket,
        feature_weight=leaf(S, T, dtype=jnp.float32) if T > 1 else None,
        patch_layout=leaf(bucket.crops, crop[0], layout) if layout else None,
        positions=leaf(S, 3) if config.text.mrope_sections else None,
    )


def _state_placed(state: State, mesh: Mesh) -> State:
    """Decode state with KV caches sharded by rows and heads, and everything else replicated."""

    def place(x: Any) -> Any:
        axes = (None, *cache.AXES)[: x.ndim] if x.ndim > 3 else (None,) * x.ndim
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition(axes, x.shape, mesh)))

    return jax.tree.map(place, state)
