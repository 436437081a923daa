"""A run from its recipe to the trained model: resumed where it stopped, saved when it is told to end."""

import dataclasses
import pathlib
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pdrop_jax import checkpoint
from pdrop_jax.checkpoint.storage import silence_library_noise
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError, printable
from pdrop_jax.model.params import Params
from pdrop_jax.model.placement import abstract, place, shardings
from pdrop_jax.model.stacking import restage
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.sharding import batch_sharding, make_mesh
from pdrop_jax.train.checkpoints import CheckpointMetadata, Checkpoints, Trained, changes
from pdrop_jax.train.data.pipeline import Dataset, Step, check_batches, open_dataset, pipeline
from pdrop_jax.train.model import is_made_of, open_start, write_model
from pdrop_jax.train.optimizer import learning_rate, make_optimizer
from pdrop_jax.train.progress import Progress
from pdrop_jax.train.recipe import MOST_STEPS, Recipe, RunRecipe, checked
from pdrop_jax.train.startup import describe, step_macs
from pdrop_jax.train.step import Metrics, TrainState, changing, init_state, join, not_finite, train_step

MODEL = "model"  # the trained model, in the run's folder


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What does not change while a run goes on."""

    recipe: Recipe
    config: LlavaConfig
    dataset: Dataset
    steps: int
    optimizer: optax.GradientTransformation
    mesh: Mesh

    def init(self, params: Params) -> TrainState:
        return init_state(
            self.config, params, self.recipe.model.groups, self.optimizer, jnp.dtype(self.recipe.model.dtype)
        )


def train(recipe: Recipe, *, allow_changes: bool = False) -> None:
    """Runs ``recipe`` in its folder, from the newest whole checkpoint there if there is one, and writes the model.

    Returns early, with everything saved, on SIGTERM and on Ctrl-C.

    Args:
      allow_changes: go on although the recipe, the data or the model to start from is not what the run began with.

    Raises:
      UserError: anything of the recipe that cannot be had, a changed recipe, a full disk, parameters or gradients that
        are not finite.
    """
    silence_library_noise()
    recipe = checked(recipe)
    folder = pathlib.Path(recipe.run.folder)
    job, params, origin = open_job(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(job.mesh), Checkpoints(folder, recipe.run) as checkpoints:
        first, state = _begin(job, params, checkpoints, origin, allow_changes)
        del params
        if bad := not_finite(join(state.trained, state.frozen)):
            raise UserError(
                f"{len(bad)} arrays of the model {recipe.model.start} hold NaN or infinity, {bad[0]} is the first: "
                "start from another, or convert it again"
            )
        batches = _batches(job, first)
        if jax.process_index() == 0:
            print(printable(describe(recipe, job.config, job.dataset, state, job.steps), keep="\n"), file=sys.stderr)
            if first:
                print(f"resumed     after {first:,} steps", file=sys.stderr)
        last, state = _run(job, batches, first, state, checkpoints, origin)
        if last < job.steps:
            print(f"stopped after {last:,} of {job.steps:,} steps: the same command goes on", file=sys.stderr)
            return
        made_of = Trained(**vars(origin) | {"step": last}, checkpoint=checkpoints.digest(last) or "")
        if not is_made_of(folder / MODEL, made_of):  # the run went on since, or was killed before it wrote one
            write_model(folder / MODEL, job.config, join(state.trained, state.frozen), recipe, made_of)
    if jax.process_index() == 0:
        print(f"{printable(folder / MODEL)}: trained for {last:,} steps", file=sys.stderr)


def open_job(recipe: Recipe) -> tuple[TrainingRun, Params, CheckpointMetadata]:
    """All that has to be known before anything is compiled, the model to start from, and what the run belongs to.

    Raises:
      UserError: anything of the recipe that cannot be had.
    """
    run, mesh = recipe.run, mesh_of(recipe)
    config, params = open_start(recipe, mesh)
    dataset = open_dataset(recipe.data, config, recipe.model.start)
    check_batches(dataset, run.batch_size, _parts(mesh, run), jax.process_count())
    steps = run.epochs * (len(dataset) // run.batch_size) if run.steps is None else run.steps
    if steps > MOST_STEPS:
        raise UserError(
            f"run.epochs {run.epochs:,} are {steps:,} steps, at most {MOST_STEPS:,} are supported: lower it"
        )
    job = TrainingRun(recipe, config, dataset, steps, make_optimizer(config, recipe.optimizer, steps), mesh)
    start = checkpoint.fingerprint(recipe.model.start)
    return (
        job,
        params,
        CheckpointMetadata(0, dataclasses.asdict(recipe), config.schedule.to_json(), start, dataset.fingerprint),
    )


def mesh_of(recipe: Recipe) -> Mesh:
    """The mesh of a recipe, over all devices of all processes.

    Raises:
      UserError: it does not fit the devices, or heads would be cut across processes, which read different rows.
    """
    sizes = dataclasses.asdict(recipe.mesh)
    if sizes["fsdp"] is None:
        sizes["fsdp"] = max(jax.device_count() // (sizes["data"] * sizes["tensor"]), 1)
    if jax.local_device_count() % sizes["tensor"]:
        raise UserError(
            f"mesh.tensor is {sizes['tensor']} but a process has {jax.local_device_count()} devices: "
            "choose a divisor of that"
        )
    return make_mesh(sizes)


def _begin(
    job: TrainingRun, params: Params, checkpoints: Checkpoints, origin: CheckpointMetadata, allow_changes: bool
) -> tuple[int, TrainState]:
    """Steps taken so far, and the state after them. The stages of a checkpoint may end elsewhere than the job's."""
    shapes = jax.eval_shape(lambda x: x, params)

    def abstract_of(saved: CheckpointMetadata) -> Any:
        different = changes(saved, origin)
        if different and not allow_changes:
            raise UserError(
                f"{job.recipe.run.folder} was begun otherwise: {'; '.join(different)}. Choose another run.folder, put "
                "it back, or go on all the same with --allow-changes"
            )
        schedule = DropSchedule.from_json(saved.schedule)
        state = jax.eval_shape(lambda params: job.init(restage(params, job.config, schedule)), shapes)
        return abstract(job.config, changing(state), job.mesh)

    found = checkpoints.restore(abstract_of)
    params = place(job.config, params, job.mesh)
    state = jax.jit(job.init, out_shardings=shardings(job.config, jax.eval_shape(job.init, params), job.mesh))(params)
    if not found:
        return 0, state
    saved, arrays = found
    old = dataclasses.replace(job.config, schedule=DropSchedule.from_json(saved.schedule))
    step = jnp.asarray(saved.step, jnp.int32, device=NamedSharding(job.mesh, PartitionSpec()))
    return saved.step, TrainState(step, frozen=state.frozen, **_restaged(arrays, old, job.config.schedule))


def _batches(job: TrainingRun, first: int) -> Iterable[Step]:
    run, parts = job.recipe.run, _parts(job.mesh, job.recipe.run)
    process, processes, workers = jax.process_index(), jax.process_count(), job.recipe.data.workers
    return pipeline(job.dataset, run.batch_size, run.seed, job.steps, first, parts, process, processes, workers)


def _parts(mesh: Mesh, run: RunRecipe) -> int:
    """What the rows of a step are cut into, over devices and one after the other."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * run.grad_accum_steps


def _run(
    job: TrainingRun,
    batches: Iterable[Step],
    first: int,
    state: TrainState,
    checkpoints: Checkpoints,
    origin: CheckpointMetadata,
) -> tuple[int, TrainState]:
    """Steps first + 1..steps, or until it is told to end. Returns the steps taken and the state after them."""
    run, model = job.recipe.run, job.recipe.model
    rate = learning_rate(job.recipe.optimizer.learning_rate, job.recipe.optimizer.warmup, job.steps)
    rates = jax.device_get(jax.vmap(rate)(np.arange(job.steps)))
    number, late, shapes = first, None, set()
    with Progress(pathlib.Path(run.folder), first, job.steps, run.log_every) as progress, _Stop() as stop:

        def log(number: int, metrics: Metrics, read: Step) -> None:
            macs = step_macs(job.config, job.dataset, job.recipe, read.batch.bucket)
            skipped = progress.step(number, metrics, macs, float(rates[number - 1]), read.invalid).skipped_in_row
            if skipped >= run.max_skipped:
                checkpoints.wait()
                raise UserError(
                    f"the gradients of {skipped} steps in a row, to step {number:,}, are not finite, so nothing is "
                    f"learned; {checkpoints.kept}: lower optimizer.learning_rate, or raise run.max_skipped"
                )

        for number, read in enumerate(batches, first + 1):
            began = time.perf_counter()
            state, metrics = train_step(
                job.config,
                job.optimizer,
                state,
                _placed(read.batch, batch_sharding(job.mesh)),
                dtype=jnp.dtype(model.dtype),
                grad_accum_steps=run.grad_accum_steps,
                remat=model.remat,
            )
            bucket, queries = read.batch.bucket, read.batch.query_rows.shape[1]
            if (bucket, queries) not in shapes:
                shapes.add((bucket, queries))
                seconds = time.perf_counter() - began
                progress.event("compiled", number, text=bucket.text, images=bucket.images, seconds=seconds)
            if late:  # the step before: its metrics are there or nearly so, and the device has work
                log(*late)
            late = number, metrics, read
            checkpoints.wait(block=False)
            stopping = stop.requested(number)
            if stopping or number % run.save_every == 0 or number == job.steps:
                log(*late)  # the log is never behind a checkpoint
                late = None
                checkpoints.save(dataclasses.replace(origin, step=number), changing(state))
                progress.event("saved", number)
            if stopping:
                break
        checkpoints.wait()
    return number, state


def _restaged(state: Any, config: LlavaConfig, schedule: DropSchedule) -> Any:
    """``state`` with the stages of every parameter tree in it, weights and moments, as ``schedule`` has them."""

    def is_tree(x: Any) -> bool:
        return isinstance(x, dict) and "stages" in x

    return jax.tree.map(lambda x: restage(x, config, schedule) if is_tree(x) else x, state, is_leaf=is_tree)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    """This process' rows of a tree of arrays, as part of the arrays of all processes."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


class _Stop:
    """Whether somebody asked the run to end: SIGTERM to any process, or Ctrl-C."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> "_Stop":
        # With several processes jax has taken SIGTERM for itself, so that they agree on the step.
        signals = [signal.SIGINT, *([signal.SIGTERM] if jax.process_count() == 1 else [])]
        self._before = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def requested(self, step: int) -> bool:
        return self._asked or multihost_utils.reached_preemption_sync_point(step)
