"""A run from its recipe to the trained model: resumed where it stopped, saved when it is told to end."""

import dataclasses
import pathlib
import shutil
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pdrop_jax import checkpoint
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.layers import Params
from pdrop_jax.model.lora import add_lora, merge_lora
from pdrop_jax.model.params import restage
from pdrop_jax.schedule import DropSchedule

from .checkpoints import Checkpoints, Origin, changes
from .data import open_dataset, pipeline
from .optimizer import GROUPS, learning_rate, make_optimizer
from .progress import Progress
from .recipe import Model, Recipe
from .startup import describe, step_macs
from .step import TrainState, init_state, join, train_step

MODEL = "model"  # the trained model, in the run's folder


def train(recipe: Recipe, *, allow_changes: bool = False) -> None:
    """Runs ``recipe`` in its folder, from the newest whole checkpoint there if there is one, and writes the model.

    Returns early, with everything saved, on SIGTERM and on Ctrl-C.

    Args:
      allow_changes: go on although the recipe, the data or the model to start from is not what the run began with.

    Raises:
      UserError: anything of the recipe that cannot be had, a changed recipe, a full disk.
    """
    folder = pathlib.Path(recipe.run.folder)
    config, params = open_start(recipe)
    dataset = open_dataset(recipe.data, config, recipe.model.start)
    run, dtype = recipe.run, jnp.dtype(recipe.model.dtype)
    steps = run.epochs * (len(dataset) // run.batch_size) if run.steps is None else run.steps
    optimizer = make_optimizer(recipe.optimizer, steps)
    origin = Origin(
        0,
        dataclasses.asdict(recipe),
        config.schedule.to_json(),
        checkpoint.fingerprint(recipe.model.start),
        dataset.fingerprint,
    )
    folder.mkdir(parents=True, exist_ok=True)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, by_row = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def init(params: Params) -> TrainState:
        return init_state(params, recipe.model.groups, optimizer, dtype)

    shapes = jax.eval_shape(lambda x: x, params)

    def saved_by(saved: Origin) -> Any:
        """What ``saved``'s checkpoint holds: its stages may end elsewhere."""
        different = changes(saved, origin)
        if different and not allow_changes:
            raise UserError(
                f"{folder} was begun otherwise: {'; '.join(different)}. Choose another run.folder, put it back, or go "
                "on all the same with --allow-changes"
            )
        schedule = DropSchedule.from_json(saved.schedule)
        state = jax.eval_shape(lambda params: init(restage(params, config, schedule)), shapes)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), _changing(state))

    with Checkpoints(folder, run) as checkpoints, _Stop() as stop:
        found = checkpoints.restore(saved_by)
        state = jax.jit(init, out_shardings=replicated)(_placed(params, replicated))
        del params
        if found:
            old = dataclasses.replace(config, schedule=DropSchedule.from_json(found[0].schedule))
            trained, moments = _restaged(found[1], old, config.schedule)
            state = TrainState(jnp.asarray(found[0].step, jnp.int32, device=replicated), trained, state.frozen, moments)
        first = found[0].step if found else 0
        if jax.process_index() == 0:
            print(describe(recipe, config, dataset, state, steps), file=sys.stderr)
            if found:
                print(f"resumed     after {first:,} steps", file=sys.stderr)
        del found
        batches = pipeline(
            dataset,
            run.batch_size,
            run.seed,
            steps,
            first,
            jax.device_count() * run.accumulate,
            jax.process_index(),
            jax.process_count(),
            recipe.data.workers,
        )
        rates = jax.device_get(
            jax.vmap(learning_rate(recipe.optimizer.learning_rate, recipe.optimizer.warmup, steps))(np.arange(steps))
        )
        number = first
        with Progress(folder, first, steps, run.log_every) as progress:
            late, compiled = None, set()
            for number, read in enumerate(batches, first + 1):
                began, shape = time.perf_counter(), (read.batch.bucket, read.batch.query_rows.shape)
                state, metrics = train_step(
                    config,
                    optimizer,
                    state,
                    _placed(read.batch, by_row),
                    dtype=dtype,
                    accumulate=run.accumulate,
                    remat=recipe.model.remat,
                )
                if shape not in compiled:
                    compiled.add(shape)
                    bucket, seconds = read.batch.bucket, time.perf_counter() - began
                    progress.event("compiled", number, text=bucket.text, images=bucket.images, seconds=seconds)
                if late:
                    progress.step(*late)
                macs = step_macs(config, dataset, recipe, read.batch.bucket)
                late = number, metrics, macs, float(rates[number - 1]), read.broken
                checkpoints.wait(block=False)
                stopping = stop.requested(number)
                if number % run.save_every == 0 or number == steps or stopping:
                    progress.step(*late)  # the log is never behind a checkpoint
                    late = None
                    checkpoints.save(dataclasses.replace(origin, step=number), _changing(state))
                    progress.event("saved", number)
                if stopping:
                    break
            checkpoints.wait()
        if number < steps:
            print(f"stopped after {number:,} of {steps:,} steps: the same command goes on", file=sys.stderr)
            return
        if number > first or not (folder / MODEL).exists():
            write_model(folder / MODEL, config, join(state.trained, state.frozen), recipe)
    if jax.process_index() == 0:
        print(f"{folder / MODEL}: trained for {steps:,} steps", file=sys.stderr)


def open_start(recipe: Recipe) -> tuple[LlavaConfig, Params]:
    """The model that a run starts from, with the recipe's schedule and fresh adapters.

    Raises:
      UserError: it cannot be had as asked for.
    """
    model, data = recipe.model, recipe.data
    _check_groups(model)
    if data.image_aspect == "anyres":
        raise UserError('data.image_aspect "anyres", LLaVA-NeXT\'s tiles, is not supported yet: choose "pad"')
    if (model.layers is None) != (model.ratios is None):
        raise UserError("model.layers and model.ratios belong together: give both or neither")
    schedule = None if model.layers is None else DropSchedule(model.layers, model.ratios or ())
    config, params = checkpoint.load(model.start, schedule=schedule)
    config = dataclasses.replace(
        config,
        image_aspect=data.image_aspect or config.image_aspect,
        template=config.template if data.template == "plain" else data.template,
    )
    if model.lora_rank:
        params = add_lora(params, config, model.lora_rank, model.lora_alpha, model.lora_targets, seed=recipe.run.seed)
    return config, params


def _check_groups(model: Model) -> None:
    unknown = [group for group in model.groups if group not in GROUPS]
    if unknown or not model.groups:
        raise UserError(f"model.groups is {list(model.groups)}: choose of {', '.join(GROUPS)}")
    if ("lora" in model.groups) != bool(model.lora_rank):
        raise UserError(
            f"model.lora_rank is {model.lora_rank} and model.groups {list(model.groups)}: "
            'for LoRA give a rank and name the group "lora"'
        )


def write_model(folder: pathlib.Path, config: LlavaConfig, params: Params, recipe: Recipe) -> None:
    """Writes the trained model as a plain checkpoint: adapters merged, in the compute dtype."""
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that has gone on since
    multihost_utils.sync_global_devices("room for the model")
    dtype = jnp.dtype(recipe.model.dtype)
    params = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(dtype), merge_lora(params)))(params)
    checkpoint.save(folder, config, params, companions=recipe.model.start)


def _changing(state: TrainState) -> tuple[Params, Any]:
    return state.trained, state.optimizer


def _restaged(state: Any, config: LlavaConfig, schedule: DropSchedule) -> Any:
    """``state`` with the stages of every parameter tree in it, weights and moments, as ``schedule`` has them."""

    def is_tree(x: Any) -> bool:
        return isinstance(x, dict) and "stages" in x

    return jax.tree.map(lambda x: restage(x, config, schedule) if is_tree(x) else x, state, is_leaf=is_tree)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    """This process' part of a tree of arrays, as part of the arrays of all processes."""
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
