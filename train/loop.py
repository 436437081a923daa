"""The training loop: from a recipe to the trained model, with resume and a clean stop on SIGTERM and Ctrl-C."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pdrop_jax import checkpoint
from pdrop_jax.batch import Bucket
from pdrop_jax.checkpoint.noise import silence_library_noise
from pdrop_jax.compilation_cache import CompilationStats
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError, printable
from pdrop_jax.model.params import Params
from pdrop_jax.model.placement import abstract, place, shardings
from pdrop_jax.model.stacking import restage
from pdrop_jax.paths import as_path, in_bucket, probe
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.sharding import devices_along, make_mesh
from pdrop_jax.train.checkpoints import CheckpointMetadata, Checkpoints, Trained, changes
from pdrop_jax.train.checks import Check, due_checks, missing_checks, open_checks, run_checks
from pdrop_jax.train.data.pipeline import Dataset, Step, check_batches, import_grain, open_dataset, pipeline
from pdrop_jax.train.data.standby import views
from pdrop_jax.train.model import is_up_to_date, open_start, write_model
from pdrop_jax.train.optimizer import learning_rate, make_optimizer
from pdrop_jax.train.progress import Progress
from pdrop_jax.train.recipe import MOST_STEPS, MeshRecipe, Recipe, RunRecipe, checked
from pdrop_jax.train.spool import spooled
from pdrop_jax.train.startup import describe, few_rows, step_macs
from pdrop_jax.train.step import (
    Metrics,
    TrainState,
    changing,
    compiler_options,
    init_state,
    join,
    not_finite,
    place_rows,
    train_step_with,
    unknown_options,
)
from pdrop_jax.train.stopping import StopRequest
from pdrop_jax.train.timing import SAVING
from pdrop_jax.train.tracing import Trace
from pdrop_jax.train.writers import check_writers

MODEL = "model"  # folder of the trained model, inside the run folder


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """Everything that stays constant during a run.

    Attributes:
      steps: optimizer steps of the whole run.
      checks: what is measured between steps.
    """

    recipe: Recipe
    config: LlavaConfig
    dataset: Dataset
    steps: int
    optimizer: optax.GradientTransformation
    mesh: Mesh
    checks: Sequence[Check]

    def init(self, params: Params) -> TrainState:
        """Training state before the first step."""
        return init_state(
            self.config, params, self.recipe.model.groups, self.optimizer, jnp.dtype(self.recipe.model.dtype)
        )


def train(recipe: Recipe, *, allow_changes: bool = False, profile: tuple[int, int] | None = None) -> None:
    """Trains a model and writes it to the run folder, resuming from the newest intact checkpoint there.

    On SIGTERM and Ctrl-C, it saves a checkpoint and returns early.

    Args:
      allow_changes: resume even if the recipe, the data or the starting model has changed.
      profile: first and last step of a profile that is written to the run folder.

    Raises:
      UserError: the recipe is invalid or does not fit the model, the data or the devices; the recipe has changed; the
        disk is full; or parameters or gradients are not finite.
    """
    silence_library_noise()
    recipe = checked(recipe)
    check_writers(recipe.log.wandb)
    folder = as_path(recipe.run.folder)
    if in_bucket(folder):
        probe(folder)
    job, params, metadata = open_job(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(job.mesh), Checkpoints(folder, recipe.run) as checkpoints, CompilationStats() as programs:
        first, state = _begin(job, params, checkpoints, metadata, allow_changes)
        del params
        if bad := not_finite(join(state.trained, state.frozen)):
            raise UserError(
                f"{len(bad)} arrays of the model {recipe.model.start} contain NaN or infinity, the first is {bad[0]}: "
                "convert it again, or start from a different model"
            )
        batches = _batches(job, first)
        if jax.process_index() == 0:
            summary = describe(recipe.run, recipe.model.groups, job.config, job.dataset, state, job.steps)
            print(printable(summary, keep="\n"), file=sys.stderr)
            if warning := few_rows(recipe.run, job.mesh):
                print(f"warning: {warning}", file=sys.stderr)
            if first:
                print(f"resumed     after {first:,} steps", file=sys.stderr)
        last, state = _run(job, batches, first, state, checkpoints, metadata, profile)
        if last < job.steps:
            print(f"stopped after {last:,} of {job.steps:,} steps: run the same command to resume", file=sys.stderr)
            return
        trained = Trained(**vars(metadata) | {"step": last}, checkpoint=checkpoints.digest(last) or "")
        if not is_up_to_date(folder / MODEL, trained):  # the run was extended, or killed before it wrote its model
            write_model(folder / MODEL, job.config, join(state.trained, state.frozen), recipe.model, trained)
    if jax.process_index() == 0:
        print(programs.text(), file=sys.stderr)
        print(f"{printable(folder / MODEL)}: trained for {last:,} steps", file=sys.stderr)


def open_job(recipe: Recipe) -> tuple[TrainingRun, Params, CheckpointMetadata]:
    """Opens everything that a run needs before it compiles.

    Returns:
      The job, the parameters to start from, and the metadata of step 0.

    Raises:
      UserError: the recipe does not fit the model, the data or the devices.
    """
    import_grain()  # fail before the data set is read
    run, mesh = recipe.run, mesh_of(recipe.mesh)
    config, params = open_start(recipe.model, recipe.data, run.seed, mesh)
    dataset = open_dataset(recipe.data, config, recipe.model.start)
    check_batches(dataset, run.batch_size, _parts(mesh, run), jax.process_count())
    steps = run.epochs * (len(dataset) // run.batch_size) if run.steps is None else run.steps
    if steps > MOST_STEPS:
        raise UserError(
            f"run.epochs is {run.epochs:,}, which takes {steps:,} steps, but at most {MOST_STEPS:,} are supported: "
            "lower it"
        )
    job = TrainingRun(
        recipe=recipe,
        config=config,
        dataset=dataset,
        steps=steps,
        optimizer=make_optimizer(config, recipe.optimizer, steps),
        mesh=mesh,
        checks=open_checks(recipe, config, mesh),
    )
    metadata = CheckpointMetadata(
        step=0,
        recipe=dataclasses.asdict(recipe),
        schedule=config.schedule.to_json(),
        start=checkpoint.fingerprint(recipe.model.start),
        data=dataset.fingerprint,
    )
    return job, params, metadata


def mesh_of(mesh: MeshRecipe) -> Mesh:
    """Builds the mesh over the devices of all processes.

    Raises:
      UserError: the mesh does not fit the devices, or its tensor axis would span processes, which read different rows.
    """
    sizes = dataclasses.asdict(mesh)
    if sizes["fsdp"] is None:
        sizes["fsdp"] = max(jax.device_count() // (sizes["data"] * sizes["tensor"]), 1)
    if jax.local_device_count() % sizes["tensor"]:
        raise UserError(
            f"mesh.tensor is {sizes['tensor']}, but each process has {jax.local_device_count()} devices: "
            "choose a divisor of that number"
        )
    return make_mesh(sizes)


def _begin(
    job: TrainingRun, params: Params, checkpoints: Checkpoints, metadata: CheckpointMetadata, allow_changes: bool
) -> tuple[int, TrainState]:
    """Number of steps taken so far, and the state after them.

    A checkpoint may stack its layers by a different drop schedule; it is restacked to the schedule of the job.
    """
    shapes = jax.eval_shape(lambda x: x, params)

    def abstract_of(saved: CheckpointMetadata) -> Any:
        different = changes(saved, metadata)
        if different and not allow_changes:
            raise UserError(
                f"{job.recipe.run.folder} was started with a different recipe: {'; '.join(different)}. Choose another "
                "run.folder, restore the old settings, or resume anyway with --allow-changes"
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
    run = job.recipe.run
    return pipeline(
        job.dataset,
        batch_size=run.batch_size,
        seed=run.seed,
        steps=job.steps,
        first=first,
        parts=_parts(job.mesh, run),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=job.recipe.data.workers,
    )


def _parts(mesh: Mesh, run: RunRecipe) -> int:
    """Number of equal parts that a batch is split into: data-parallel devices times microbatches."""
    return devices_along("batch", mesh) * run.grad_accum_steps


def _run(
    job: TrainingRun,
    batches: Iterable[Step],
    first: int,
    state: TrainState,
    checkpoints: Checkpoints,
    metadata: CheckpointMetadata,
    profile: tuple[int, int] | None,
) -> tuple[int, TrainState]:
    """Runs steps first + 1..steps, or fewer if asked to stop. Returns the number of steps taken and the new state."""
    run, model, dtype = job.recipe.run, job.recipe.model, jnp.dtype(job.recipe.model.dtype)
    optimizer = job.recipe.optimizer
    rate = learning_rate(optimizer.learning_rate, optimizer.warmup, job.steps, optimizer.final_share)
    rates = jax.device_get(jax.vmap(rate)(np.arange(job.steps)))
    number, pending, shapes = first, None, set[tuple[Bucket, int]]()
    options = compiler_options(jax.default_backend(), run.batch_size // _parts(job.mesh, run))
    unknown = unknown_options(options)
    step = train_step_with({name: value for name, value in options.items() if name not in unknown})
    with (
        spooled(as_path(run.folder)) as spool,
        Progress(spool.folder, first, job.steps, job.recipe) as progress,
        StopRequest() as stop,
        Trace(profile, spool.folder, first, job.steps) as trace,
    ):
        if unknown:
            names = ", ".join(unknown)
            progress.say(
                f"warning: this TPU compiler does not know {names}, so steps take longer: install jax[tpu]'s libtpu"
            )

        def log(number: int, metrics: Metrics, read: Step) -> None:
            macs = step_macs(job.config, job.dataset, run.batch_size, model.groups, read.batch.bucket)
            skipped = progress.step(number, metrics, macs, float(rates[number - 1]), read.invalid).skipped_in_row
            if skipped >= run.max_skipped:
                checkpoints.wait()
                raise UserError(
                    f"the gradients of the last {skipped} steps, up to step {number:,}, are not finite, so these steps "
                    f"were skipped; {checkpoints.kept}: lower optimizer.learning_rate, or raise run.max_skipped"
                )

        def check(checks: Sequence[Check]) -> None:
            run_checks(checks, number, job.config, state, job.mesh, dtype, progress)

        check(missing_checks(job.checks, first, job.steps, progress.events))
        for number, read in enumerate(progress.timer.batches(batches), first + 1):
            trace.before(number, state)
            began = time.perf_counter()
            with _compiling(shapes, number, read, progress), jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = step(
                    job.config,
                    job.optimizer,
                    state,
                    place_rows(views(read.batch, job.config, job.recipe.data.image_mode), job.mesh),
                    dtype=dtype,
                    grad_accum_steps=run.grad_accum_steps,
                    remat=model.remat,
                )
            progress.timer.dispatched(began, metrics.loss)
            if pending:  # log the previous step only now: fetching its metrics does not leave the device idle
                log(*pending)
            pending = number, metrics, read
            if trace.after(number, state):
                progress.say(f"profile     written to {as_path(run.folder) / trace.folder.name}")
            checkpoints.wait(block=False)
            stopping = stop.requested(number)
            saving = stopping or number % run.save_every == 0 or number == job.steps
            due = [] if stopping else due_checks(job.checks, number, job.steps)  # made when the run is resumed
            if saving or due:
                log(*pending)  # the log must never be behind a checkpoint
                pending = None
                spool.upload()
            if saving:
                with progress.timer.spending(SAVING):
                    checkpoints.save(dataclasses.replace(metadata, step=number), changing(state))
                progress.event("saved", number)
            check(due)
            if stopping:
                break
        with progress.timer.spending(SAVING):
            checkpoints.wait()
        if number > first:
            progress.say(progress.summary(number))
    return number, state


def _compiling(
    shapes: set[tuple[Bucket, int]], number: int, read: Step, progress: Progress
) -> contextlib.AbstractContextManager:
    """The context of step ``number``, which compiles if its shape is not in ``shapes`` yet."""
    bucket, queries = read.batch.bucket, read.batch.query_rows.shape[1]
    if (bucket, queries) in shapes:
        return contextlib.nullcontext()
    shapes.add((bucket, queries))
    what = f"training step for {bucket.text} text + {sum(bucket.images)} image slots"
    return progress.compiling(what, number, text=bucket.text, images=bucket.images)


def _restaged(state: Any, config: LlavaConfig, schedule: DropSchedule) -> Any:
    """Restacks every parameter tree in ``state``, weights and moments, into the stages of ``schedule``."""

    def is_tree(x: Any) -> bool:
        return isinstance(x, dict) and "stages" in x

    return jax.tree.map(lambda x: restage(x, config, schedule) if is_tree(x) else x, state, is_leaf=is_tree)
