"""Open the model that training starts from, and write the trained model."""

import dataclasses
import functools
import pathlib
from typing import Any

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
from pdrop_jax.paths import as_path, in_bucket, remove_folder
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.schema import validated
from pdrop_jax.train.checkpoints import Checkpoints, Trained, changes
from pdrop_jax.train.recipe import DataRecipe, ModelRecipe
from pdrop_jax.train.step import not_finite


def open_start(model: ModelRecipe, data: DataRecipe, seed: int, mesh: Mesh | None = None) -> tuple[LlavaConfig, Params]:
    """Loads the starting checkpoint, with the schedule, image aspect and template of the recipe.

    The parameters keep the dtype of the checkpoint. New LoRA adapters and a new newline vector are added if the recipe
    asks for them.

    Args:
      seed: RNG seed for new parameters.
      mesh: mesh to shard the parameters over; None places them on one device. LoRA adapters are not sharded.

    Raises:
      UserError: the checkpoint cannot be read, or the recipe does not fit it.
    """
    _check_groups(model, LlavaConfig.load(as_path(model.start)))
    if (model.layers is None) != (model.ratios is None):
        raise UserError("model.layers and model.ratios must be given together: set both or neither")
    schedule = None if model.layers is None else DropSchedule(model.layers, model.ratios or (), score=model.score)
    config, params = checkpoint.load(model.start, schedule=schedule, mesh=mesh)
    if data.image_mode != "focus" and not config.standby:
        raise UserError(
            f"data.image_mode is {data.image_mode!r}, but the model has no standby tokens: convert it with --standby 16"
        )
    if "standby" in model.groups and data.image_mode == "focus":
        raise UserError(
            'model.groups contains "standby", but data.image_mode is "focus", which shows no standby tokens: set it to '
            '"standby" or "both"'
        )
    checkpoint.files_to_copy(as_path(model.start), checkpoint.COMPANIONS)  # fail now, not after the last step
    if data.template not in (None, "plain"):  # pretraining leaves no way to ask
        config = dataclasses.replace(config, template=data.template)
    if data.image_aspect and config.family != "LLaVA":
        raise UserError(
            f"data.image_aspect is {data.image_aspect!r}, but a {config.family} model takes pictures of any "
            "aspect: remove it"
        )
    if data.image_aspect == "anyres" or data.image_aspect == "slices":
        had, choice = config.tiling, "area" if data.image_aspect == "anyres" else "aspect"
        if not had or had.choice != choice:
            make = Tiling.next if choice == "area" else Tiling.slices
            config = dataclasses.replace(config, tiling=make(config.crop_tower.image_size))
        if not had:
            params = params | {"newline": {"embedding": _new_newline(config, params, seed, mesh)}}
    elif data.image_aspect:
        config = dataclasses.replace(config, image_aspect=data.image_aspect, tiling=None)
        params.pop("newline", None)
    if model.lora_rank:
        params = add_lora(params, config, model.lora_rank, model.lora_alpha, model.lora_targets, seed)
    return config, params


def _new_newline(config: LlavaConfig, params: Params, seed: int, mesh: Mesh | None) -> jax.Array:
    """A (D,) vector drawn from a normal distribution with standard deviation 1/sqrt(D), as in LLaVA-NeXT."""
    D, embedding = config.text.hidden_size, params["embed"]["embedding"]
    vector = jax.random.normal(jax.random.key(seed), (D,), jnp.float32) / D**0.5
    vector = vector.astype(embedding.dtype)
    return vector if mesh is None else place(config, {"newline": {"embedding": vector}}, mesh)["newline"]["embedding"]


def _check_groups(model: ModelRecipe, config: LlavaConfig) -> None:
    if ("lora" in model.groups) != bool(model.lora_rank):
        raise UserError(
            f"model.lora_rank is {model.lora_rank} but model.groups is {list(model.groups)}: "
            'LoRA needs both a rank above 0 and the group "lora"'
        )
    if "compressor" in model.groups and config.vision.early_compression is None:
        raise UserError(
            'model.groups names "compressor", but the vision tower has none: convert the model with --compress-vision K'
        )
    if model.lora_rank > config.text.hidden_size:
        raise UserError(
            f"model.lora_rank is {model.lora_rank}, but the weight matrices of the model have rank at most "
            f"{config.text.hidden_size}: lower it"
        )


@functools.partial(jax.jit, static_argnames="dtype")
def for_inference(params: Params, dtype: Any) -> Params:
    """Parameters in ``dtype`` with LoRA adapters merged."""
    return jax.tree.map(lambda x: x.astype(dtype), merge_lora(params))


def write_model(
    folder: pathlib.Path, config: LlavaConfig, params: Params, model: ModelRecipe, metadata: Trained
) -> None:
    """Writes the trained model as a checkpoint in the compute dtype, with LoRA adapters merged.

    All processes must call it. On the local disk, an existing model is only replaced once the new one is complete.

    Raises:
      UserError: a parameter is NaN or infinite, or the disk has no room for the new model next to the old one.
      OSError: the disk is full or not writable.
    """
    params = for_inference(params, dtype=jnp.dtype(model.dtype))
    if bad := not_finite(params):
        raise UserError(
            f"the model after {metadata.step:,} steps is not written to {folder}: {len(bad)} of its arrays contain NaN "
            f"or infinity, the first is {bad[0]}; lower optimizer.learning_rate"
        )
    new, old = (folder.with_name(f".{folder.name}.{which}") for which in ("new", "old"))
    if in_bucket(folder):  # which cannot rename; the run can write its model again from its last checkpoint
        new = folder
    main = jax.process_index() == 0
    if main:  # left by a run that was killed here
        remove_folder(new)
        remove_folder(old)
    multihost_utils.sync_global_devices("leftovers of an earlier run removed")
    checkpoint.save(new, config, params, companions=model.start, training=dataclasses.asdict(metadata))
    if main and new != folder:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        remove_folder(old)
    multihost_utils.sync_global_devices("model written")


def is_up_to_date(folder: pathlib.Path, metadata: Trained) -> bool:
    """Whether ``folder`` already contains the model that ``write_model`` would write with this metadata."""
    found = _read_metadata(folder)
    return found is not None and found.checkpoint == metadata.checkpoint and not changes(found, metadata)


def is_newest(folder: pathlib.Path, checkpoints: Checkpoints) -> bool:
    """Whether ``folder`` contains a model and no checkpoint is newer."""
    if not checkpoints.steps:
        return folder.exists()
    found = _read_metadata(folder)
    return found is not None and found.checkpoint == checkpoints.digest(checkpoints.steps[0])


def _read_metadata(folder: pathlib.Path) -> Trained | None:
    """Metadata of the model in ``folder``; None if it is missing, damaged, or was not written by this version."""
    try:
        return validated(Trained, checkpoint.training(folder), str(folder / checkpoint.TRAINING))
    except UserError:
        return None
