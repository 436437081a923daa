"""The model of a training run, finished or not."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from pdrop_jax.errors import UserError, printable
from pdrop_jax.schema import validated
from pdrop_jax.train.checkpoints import FOLDER, CheckpointMetadata, Checkpoints, Trained
from pdrop_jax.train.loop import MODEL
from pdrop_jax.train.model import is_newest, open_start, write_model
from pdrop_jax.train.optimizer import make_optimizer
from pdrop_jax.train.recipe import Recipe, RunRecipe
from pdrop_jax.train.step import changing, init_state, join, split


def is_run(folder: pathlib.Path) -> bool:
    """Whether ``folder`` is the folder of a training run."""
    return (folder / FOLDER).is_dir()


def model_of(run: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """Folder of a run's newest model.

    This is the model that the run wrote, if it comes from the newest checkpoint. Otherwise the model is built from that
    checkpoint and written below ``scratch``.

    Raises:
      UserError: the run has no checkpoint, or the starting checkpoint of the run is missing.
    """
    opened: dict[str, Any] = {}

    def abstract_of(saved: CheckpointMetadata) -> Any:
        recipe = validated(Recipe, saved.recipe, f"the checkpoint of step {saved.step} in {run}")
        config, params = open_start(recipe.model, recipe.data, recipe.run.seed)
        optimizer = make_optimizer(config, recipe.optimizer, 1)  # the state has the same shapes for any number of steps
        opened.update(recipe=recipe, config=config, params=params)
        dtype = jnp.dtype(recipe.model.dtype)
        state = jax.eval_shape(lambda params: init_state(config, params, recipe.model.groups, optimizer, dtype), params)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), changing(state))

    with Checkpoints(run, RunRecipe(folder=str(run))) as checkpoints:
        if is_newest(run / MODEL, checkpoints):
            return run / MODEL
        found = checkpoints.restore(abstract_of)
        if not found:
            raise UserError(
                f"{run} has no checkpoint yet, so there is no model to export: wait until the run has saved one"
            )
        saved, arrays = found
        metadata = Trained(**vars(saved), checkpoint=checkpoints.digest(saved.step) or "")
    why = (
        f"the model in {run / MODEL} is older than the newest checkpoint"
        if (run / MODEL).exists()
        else f"{run} has not finished"
    )
    print(f"{printable(why)}: using the checkpoint after {saved.step:,} steps")
    recipe, config, params = opened["recipe"], opened["config"], opened["params"]
    _, frozen = split(config, params, recipe.model.groups)
    write_model(scratch / MODEL, config, join(arrays["trained"], frozen), recipe.model, metadata)
    return scratch / MODEL
