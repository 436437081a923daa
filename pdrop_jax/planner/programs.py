"""Training step, prefill and decode as programs of shapes alone, compiled for devices that are not there."""

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
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import State, decode, start
from pdrop_jax.generation.next_token import token_sampler
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.model.params import abstract_params
from pdrop_jax.model.placement import abstract
from pdrop_jax.model.quantization import quantize_decoder
from pdrop_jax.planner.hlo import Report, compile_report
from pdrop_jax.sharding import batch_sharding, make_mesh, partition
from pdrop_jax.train.optimizer import make_optimizer
from pdrop_jax.train.recipe import OptimizerRecipe
from pdrop_jax.train.step import init_state, train_step

GROUPS = ("projector", "llm")
QUERIES = 4  # query rows of a training row
CAPACITY = 128  # new tokens of an answer
STEPS = 1000  # of a training run; only its rates follow from it
TENSOR = (1, 2, 4, 8)  # devices along tensor that ``suggest`` tries


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to plan, bfloat16 with splash attention.

    Attributes:
      mode: "train" is a step of a full fine-tune, with float32 masters and moments.
      rows: of a batch, all devices together.
      grad_accum_steps: parts that a training step's rows are cut into.
      groups: what is trained, of "vision", "projector" and "llm".
      quantize: the decoder's weights in inference, see ``model.quantization``.
    """

    config: LlavaConfig
    mode: Literal["train", "prefill", "decode"]
    bucket: Bucket
    rows: int
    grad_accum_steps: int = 1
    groups: tuple[str, ...] = GROUPS
    quantize: Literal["int8"] | None = None

    @property
    def macs(self) -> float:
        """Of all rows, from the model. In training half of the text is taken to be answers."""
        if self.mode == "train":
            return self.rows * training_macs(self.config, self.bucket, self.bucket.text / 2, self.groups)
        if self.mode == "prefill":
            return self.rows * prefill_macs(self.config, self.bucket).total
        return self.rows * decode_macs(self.config, self.bucket)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job on a mesh of a slice, and what the compiler says of it."""

    job: Program
    mesh: dict[str, int]
    report: Report


def groups_of(config: LlavaConfig) -> tuple[str, ...]:
    """What a full fine-tune trains: of LLaVA-NeXT, which cuts pictures into tiles, the tower too."""
    return ("vision", *GROUPS) if config.tiling else GROUPS


def plan(job: Program, sizes: dict[str, int] | None, topology: str, devices: Sequence[jax.Device]) -> Plan:
    """Compiles ``job``.

    Args:
      sizes: devices along each axis; None is all along fsdp.
      topology: of ``devices``, see ``topology.devices_of``.

    Raises:
      UserError: a mesh that the devices do not make, or rows that it cannot cut.
    """
    mesh = make_mesh(sizes, devices)
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * (job.grad_accum_steps if job.mode == "train" else 1)
    if job.rows < 1 or job.rows % parts:
        raise UserError(f"{job.rows} rows cannot be cut into {parts} parts: choose a multiple of {parts}")
    return Plan(job, dict(mesh.shape), compile_report(lambda: lower(job, mesh), topology))


def suggest(job: Program, devices: int, compiled: Callable[[Program, dict[str, int]], Plan]) -> list[Plan]:
    """What fits on each mesh of fsdp and tensor; first what moves the fewest bytes a row between so many ``devices``.

    In training the rows stay and are cut into more and more parts until they fit. In inference they are doubled for as
    long as they fit, and the last that did is taken. MACs are no reason to choose: they are shared out on any mesh.

    Args:
      compiled: ``plan`` on a mesh of these sizes.
    """
    found = []
    for tensor in TENSOR:
        if devices % tensor or job.config.text.num_heads % tensor:
            continue
        sizes = {"fsdp": devices // tensor, "tensor": tensor}
        best = None
        for attempt in _attempts(job, sizes["fsdp"]):
            tried = compiled(attempt, sizes)
            best = tried if tried.report.fits else best
            enough = tried.report.fits if job.mode == "train" else not tried.report.fits
            if enough:
                break
        if best:
            found.append(best)
    return sorted(found, key=lambda plan: plan.report.moved_bytes / plan.job.rows)


def _attempts(job: Program, shards: int) -> Iterator[Program]:
    """``job`` with more and more parts, or more and more rows, that ``shards`` devices can cut."""
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
        program, arguments = train_step, (config, optimizer, train_state, batch)
        settings = {"grad_accum_steps": job.grad_accum_steps, "implementation": "splash"}
    else:
        params = abstract_params(config, jnp.bfloat16)
        if job.quantize:
            params = jax.eval_shape(functools.partial(quantize_decoder, config), params)
        params = abstract(config, params, mesh)
        greedy, stop = token_sampler(Sampling()), np.zeros(1, np.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        program, arguments = start, (config, params, batch, key, greedy, stop)
        settings = {"capacity": CAPACITY, "implementation": "splash"}
        if job.mode == "decode":
            state, *_ = start.eval_shape(*arguments, **settings)
            program, settings = decode, {}
            arguments = config, params, _state_placed(state, mesh), np.int32(CAPACITY), greedy, stop
    with jax.set_mesh(mesh):
        return program.lower(*arguments, **settings)


def abstract_batch(config: LlavaConfig, mesh: Mesh, bucket: Bucket, rows: int, training: bool) -> Batch:
    """Shapes of a batch that fills ``bucket``, its rows cut over the mesh."""
    where = batch_sharding(mesh, rows)

    def leaf(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

    S, T, size = bucket.slots, config.features_per_token, config.vision.image_size
    return Batch(
        leaf(S),
        leaf(S, T),
        leaf(S),
        leaf(),
        leaf(bucket.crops, size, size, 3, dtype=jnp.float32),
        leaf(QUERIES if training else 1),
        leaf(S) if training else None,
        bucket,
        leaf(S, T, dtype=jnp.float32) if T > 1 else None,
    )


def _state_placed(state: State, mesh: Mesh) -> State:
    """Caches cut by rows and heads, everything else of a decode state whole."""

    def place(x: Any) -> Any:
        axes = (None, "batch", "heads", None, None) if x.ndim == 5 else (None,) * x.ndim
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition(axes, x.shape, mesh)))

    return jax.tree.map(place, state)
