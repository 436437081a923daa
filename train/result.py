"""The model of a run, wherever the run is."""

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
    return (folder / FOLDER).is_dir()


def model_of(run: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """The folder of a run's model: the one that it wrote of its newest checkpoint, else one made in ``scratch`` of it.

    Raises:
      UserError: the run has no checkpoint, or the model that it began with is gone.
    """
    opened: dict[str, Any] = {}

    def abstract_of(saved: CheckpointMetadata) -> Any:
        recipe = validated(Recipe, saved.recipe, f"the checkpoint of step {saved.step} in {run}")
        config, params = open_start(recipe)
        optimizer = make_optimizer(config, recipe.optimizer, 1)  # its state has the same arrays whatever the steps
        opened.update(recipe=recipe, config=config, params=params)
        dtype = jnp.dtype(recipe.model.dtype)
        state = jax.eval_shape(lambda params: init_state(config, params, recipe.model.groups, optimizer, dtype), params)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), changing(state))

    with Checkpoints(run, RunRecipe(str(run))) as checkpoints:
        if is_newest(run / MODEL, checkpoints):
            return run / MODEL
        found = checkpoints.restore(abstract_of)
        if not found:
            raise UserError(f"{run} has no checkpoint yet: it has nothing to export")
        saved, arrays = found
        made_of = Trained(**vars(saved), checkpoint=checkpoints.digest(saved.step) or "")
    why = f"the model in {run / MODEL} is older" if (run / MODEL).exists() else f"{run} has not ended"
    print(f"{printable(why)}: this is its model after {saved.step:,} steps")
    recipe, config, params = opened["recipe"], opened["config"], opened["params"]
    _, frozen = split(config, params, recipe.model.groups)
    write_model(scratch / MODEL, config, join(arrays["trained"], frozen), recipe, made_of)
    return scratch / MODEL
