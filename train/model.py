"""The model that a run begins with and the one that it ends with."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pdrop_jax import checkpoint
from pdrop_jax.config import LlavaConfig, Tiling
from pdrop_jax.errors import UserError
from pdrop_jax.model.lora import add_lora, merge_lora
from pdrop_jax.model.params import Params
from pdrop_jax.model.placement import place
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.schema import validated
from pdrop_jax.train.checkpoints import Checkpoints, Trained, changes
from pdrop_jax.train.recipe import ModelRecipe, Recipe
from pdrop_jax.train.step import not_finite


def open_start(recipe: Recipe, mesh: Mesh | None = None) -> tuple[LlavaConfig, Params]:
    """The model that a run begins with: the recipe's schedule, fresh adapters, arrays as they are stored.

    Args:
      mesh: that the arrays are cut over; None is one device. Adapters are whole.

    Raises:
      UserError: it cannot be had as asked for.
    """
    model, data = recipe.model, recipe.data
    _check_groups(model, LlavaConfig.load(pathlib.Path(model.start)))
    if (model.layers is None) != (model.ratios is None):
        raise UserError("model.layers and model.ratios belong together: give both or neither")
    schedule = None if model.layers is None else DropSchedule(model.layers, model.ratios or (), score=model.score)
    config, params = checkpoint.load(model.start, schedule=schedule, mesh=mesh)
    checkpoint.files_to_copy(pathlib.Path(model.start), checkpoint.COMPANIONS)  # refused now, not after the last step
    config = dataclasses.replace(config, template=config.template if data.template == "plain" else data.template)
    if data.image_aspect == "anyres":
        if not config.tiling:
            config = dataclasses.replace(config, tiling=Tiling.next(config.vision.image_size))
            params = params | {"newline": {"embedding": _fresh_newline(config, params, recipe.run.seed, mesh)}}
    elif data.image_aspect:
        config = dataclasses.replace(config, image_aspect=data.image_aspect, tiling=None)
        params.pop("newline", None)
    if model.lora_rank:
        params = add_lora(params, config, model.lora_rank, model.lora_alpha, model.lora_targets, recipe.run.seed)
    return config, params


def _fresh_newline(config: LlavaConfig, params: Params, seed: int, mesh: Mesh | None) -> jax.Array:
    """Normal of deviation 1/sqrt(D), as LLaVA-NeXT draws it."""
    D, embedding = config.text.hidden_size, params["embed"]["embedding"]
    vector = jax.random.normal(jax.random.key(seed), (D,), jnp.float32) / D**0.5
    vector = vector.astype(embedding.dtype)
    return vector if mesh is None else place(config, {"newline": {"embedding": vector}}, mesh)["newline"]["embedding"]


def _check_groups(model: ModelRecipe, config: LlavaConfig) -> None:
    if ("lora" in model.groups) != bool(model.lora_rank):
        raise UserError(
            f"model.lora_rank is {model.lora_rank} and model.groups {list(model.groups)}: "
            'for LoRA give a rank and name the group "lora"'
        )
    if model.lora_rank > config.text.hidden_size:
        raise UserError(
            f"model.lora_rank is {model.lora_rank} but the matrices of the model have rank "
            f"{config.text.hidden_size} at most: lower it"
        )


def write_model(folder: pathlib.Path, config: LlavaConfig, params: Params, recipe: Recipe, made_of: Trained) -> None:
    """Writes a plain checkpoint, adapters merged, in the dtype of the computation. Of several processes all call it.

    What stands there stays until the new one is whole beside it.

    Raises:
      UserError: a parameter is not finite, or the disk has no room for a second model beside an old one.
      OSError: the disk is full or may not be written.
    """
    dtype = jnp.dtype(recipe.model.dtype)
    params = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(dtype), merge_lora(params)))(params)
    if bad := not_finite(params):
        raise UserError(
            f"the model after {made_of.step:,} steps is not written to {folder}: {len(bad)} of its arrays hold NaN or "
            f"infinity, {bad[0]} is the first"
        )
    new, old = (folder.with_name(f".{folder.name}.{which}") for which in ("new", "old"))
    first = jax.process_index() == 0
    if first:  # of a run that was killed here
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    multihost_utils.sync_global_devices("room for the model")
    checkpoint.save(new, config, params, companions=recipe.model.start, training=dataclasses.asdict(made_of))
    if first:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    multihost_utils.sync_global_devices("the model is there")


def is_made_of(folder: pathlib.Path, made_of: Trained) -> bool:
    """Whether the model in ``folder`` is there and is what ``write_model`` would write now."""
    found = _made_of(folder)
    return found is not None and found.checkpoint == made_of.checkpoint and not changes(found, made_of)


def is_newest(folder: pathlib.Path, checkpoints: Checkpoints) -> bool:
    """Whether the model in ``folder`` is there and no checkpoint is newer."""
    if not checkpoints.steps:
        return folder.exists()
    found = _made_of(folder)
    return found is not None and found.checkpoint == checkpoints.digest(checkpoints.steps[0])


def _made_of(folder: pathlib.Path) -> Trained | None:
    """None too for a model that does not say it, which an older version wrote, or whose word is damaged."""
    try:
        return validated(Trained, checkpoint.training(folder), str(folder / checkpoint.TRAINING))
    except UserError:
        return None
