"""What a conversion reads: a PyTorch LLaVA checkpoint, or the parts for a new one, here or on the Hugging Face Hub."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

from pdrop_jax import checkpoint
from pdrop_jax.config import LlavaConfig, read_config
from pdrop_jax.convert.files import read_folder
from pdrop_jax.convert.hf_config import llava_from_hf, namings_for
from pdrop_jax.convert.hf_parts import FAMILIES, ORIGINAL_TYPES
from pdrop_jax.convert.hub import Location, fetch_files, fetch_weights, locate, named_as_typed
from pdrop_jax.convert.names import (
    IGNORED,
    NAMINGS,
    TOWERS,
    Naming,
    closest,
    projector_shapes,
    torch_shapes,
    unrun_shapes,
)
from pdrop_jax.convert.original_config import original_type, without_last_layer
from pdrop_jax.convert.projector import fresh_projector, num_layers, open_projector, projector_type, read_projector
from pdrop_jax.convert.tensors import FLOATS, Tensors
from pdrop_jax.convert.towers import find_tower, has_known_config, named_tower, on_hub, open_tower, tower_config
from pdrop_jax.errors import UserError
from pdrop_jax.io import read_json
from pdrop_jax.schedule import DropSchedule

Change = Callable[[LlavaConfig], LlavaConfig]


def unchanged(config: LlavaConfig) -> LlavaConfig:
    return config


@dataclasses.dataclass(frozen=True)
class Source:
    """A PyTorch checkpoint whose tensors were checked against its config.

    Attributes:
      location: where it was found.
      config: with the schedule of the converted checkpoint.
      naming: names of its tensors.
      tensors: those that run, and the unused ones of the vision tower.
      tower: where the vision tower was found, if it is separate.
    """

    location: Location
    config: LlavaConfig
    naming: Naming
    tensors: Tensors
    tower: Location | None

    @property
    def folder(self) -> pathlib.Path:
        """Contains config.json and the tokenizer."""
        return self.location.folder


def open_source(
    name: str | os.PathLike | Location,
    vision: str | os.PathLike | None = None,
    schedule: DropSchedule | None = None,
    *,
    projector: pathlib.Path | None = None,
    change: Change = unchanged,
) -> Source:
    """Opens a PyTorch checkpoint and compares the names and shapes of its tensors with its config.

    Args:
      name: its folder, or its id on the Hub, from where its files are downloaded; or where ``locate`` found it.
      vision: folder or id of the vision tower, for an original checkpoint without one; None is the tower that the
        checkpoint's config names.
      projector: file of a projector that replaces the checkpoint's.
      change: what becomes of the config of the converted model; it raises UserError if it cannot.

    Raises:
      UserError: ``name`` is not a checkpoint, is damaged, or something in it is not supported. All tensors that are
        missing, unexpected or of another shape are listed.
    """
    location = name if isinstance(name, Location) else locate(name)
    with named_as_typed(location):
        data, config, tower = _open_config(location, vision, schedule)
        change(config)  # before the weights are downloaded
        original = original_type(data) is not None
        fetch_files(location)  # the rest after the config: an unsupported model is not downloaded
        folder = fetch_weights(location)
        tensors = read_folder(folder)
        namings = {key: naming for key, naming in namings_for(config).items() if key.startswith("original") == original}
        naming = namings[closest(config, tensors, namings)]
        if original and not any(name.startswith(naming.vision) for name in tensors):
            named = data.get("mm_vision_tower")
            tower = tower or named_tower(folder, named)
            fetch_weights(tower)
            fetch_files(location, [f"{named}/*"])
            tensors |= _tower_tensors(config, tower.folder, naming)
        if original and config.vision.kind == "siglip":
            config = _as_saved(config, naming, tensors)
        if projector is not None:
            tensors |= read_projector(projector, config, naming)
        what = f"{folder} does not contain the model that its config.json describes"
        return Source(location, change(config), naming, _check_tensors(config, naming, tensors, what), tower)


def source_config(location: Location) -> LlavaConfig:
    """The config that ``open_source`` gives, without the weights. UserError likewise."""
    with named_as_typed(location):
        return _open_config(location)[1]


def _open_config(
    location: Location, vision: str | os.PathLike | None = None, schedule: DropSchedule | None = None
) -> tuple[dict[str, Any], LlavaConfig, Location | None]:
    """The contents of config.json, the config, and the vision tower if the config needs one or it lies here."""
    data = _read_config(location)
    named = data.get("mm_vision_tower")
    folder = fetch_files(location, [*checkpoint.PROCESSOR, f"{named}/*.json"])  # it may be a folder of the checkpoint
    if data.get("model_type") in tuple(FAMILIES):
        raise UserError(f"{folder} is a language model: to build a LLaVA from it, use --llm {folder} --vision DIR OUT")
    if vision and original_type(data) is None:
        raise UserError(
            f"{folder} already contains its vision tower: --vision is for original LLaVA checkpoints without one"
        )
    tower = open_tower(vision) if vision else find_tower(folder, named)
    if tower is None and not has_known_config(named) and on_hub(named):
        tower = named_tower(folder, named)
    config = llava_from_hf(
        data,
        vision=tower_config(tower) if tower else None,
        generation=_optional_json(folder / "generation_config.json"),
        preprocessor=_image_processor(folder),
        schedule=schedule,
        where=str(folder / "config.json"),
    )
    return data, config, tower


def open_parts(
    llm: str | os.PathLike,
    vision: str | os.PathLike,
    schedule: DropSchedule | None = None,
    *,
    projector: pathlib.Path | None = None,
    projector_layers: int | None = None,
    seed: int = 0,
    change: Change = unchanged,
) -> Source:
    """A LLaVA made of a language model, a vision tower and a projector, as if it were an original checkpoint.

    Everything else is as in LLaVA-1.5: patch features of the second-last layer, images padded to squares.

    Args:
      llm: folder or id of a causal language model of one of the ``FAMILIES``, such as Vicuna.
      vision: folder or id of a CLIP or SigLIP vision tower.
      projector: its file; None initializes a new one.
      projector_layers: 1 is linear, 2 an MLP; None is that of ``projector``, or 2 for a new one.
      seed: RNG seed of a new projector.
      change: as in ``open_source``.

    Raises:
      UserError: as ``open_source``.
    """
    location = locate(llm)
    with named_as_typed(location):
        return _open_parts(location, vision, schedule, projector, projector_layers, seed, change)


def _open_parts(
    location: Location,
    vision: str | os.PathLike,
    schedule: DropSchedule | None,
    projector: pathlib.Path | None,
    projector_layers: int | None,
    seed: int,
    change: Change,
) -> Source:
    data = _read_config(location)
    llm = fetch_files(location, checkpoint.PROCESSOR)
    if data.get("model_type") not in tuple(FAMILIES):
        known = " or ".join(FAMILIES)
        raise UserError(f"--llm takes a {known} language model, {llm} has model_type {data.get('model_type')!r}")
    tower = open_tower(vision)
    vision_config = tower_config(tower)
    layers = projector_layers or (num_layers(open_projector(projector)) if projector else 2)
    llava = {
        "model_type": ORIGINAL_TYPES[data["model_type"]],
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision_config.hidden_size,
        "mm_projector_type": projector_type(layers),
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
    }
    generation = _optional_json(llm / "generation_config.json")
    config = llava_from_hf(
        data | llava, vision=vision_config, generation=generation, schedule=schedule, where=str(llm / "config.json")
    )
    change(config)  # before the weights are downloaded
    naming = NAMINGS["original-linear" if layers == 1 else "original"]
    fetch_files(location)
    tensors = read_folder(fetch_weights(location))
    if tensors.keys() & projector_shapes(config, naming):
        raise UserError(f"{llm} already contains a projector: move it elsewhere and pass its file, --projector FILE")
    tensors |= _tower_tensors(config, fetch_weights(tower), naming)
    tensors |= read_projector(projector, config, naming) if projector else fresh_projector(config, naming, seed)
    what = f"{llm} and {tower.name} do not contain the models that their config.json files describe"
    return Source(location, change(config), naming, _check_tensors(config, naming, tensors, what), tower)


def _read_config(location: Location) -> dict[str, Any]:
    if location.converted:
        raise UserError(f"{location.folder} is already converted")
    return read_config(location.folder)


def _image_processor(folder: pathlib.Path) -> dict[str, Any] | None:
    own = _optional_json(folder / "preprocessor_config.json")
    return own or (_optional_json(folder / "processor_config.json") or {}).get("image_processor")


def _optional_json(path: pathlib.Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _as_saved(config: LlavaConfig, naming: Naming, tensors: Tensors) -> LlavaConfig:
    """``config`` with the tower that the original code saves of SigLIP's: no last layer, no head, all of it run."""
    tower = Naming(naming.vision)
    whole = dataclasses.replace(config, select_layer=-1)
    saved = dataclasses.replace(whole, vision=without_last_layer(config.crop_tower))
    last = torch_shapes(whole, tower).keys() - torch_shapes(saved, tower).keys()
    return config if last & tensors.keys() else saved


def _tower_tensors(config: LlavaConfig, folder: pathlib.Path, naming: Naming) -> Tensors:
    """The tensors of a separate tower, under the names that they have inside a whole checkpoint."""
    tensors = read_folder(folder)
    prefix = TOWERS[closest(config, tensors, TOWERS)].vision
    return {
        naming.vision + name.removeprefix(prefix)
        if name.startswith(prefix) and not IGNORED.fullmatch(name)
        else name: x
        for name, x in tensors.items()
    }


def _check_tensors(config: LlavaConfig, naming: Naming, tensors: Tensors, what: str) -> Tensors:
    """``tensors`` without those that no model uses. Raises a UserError that starts with ``what``."""
    tied = {naming.head} if config.text.tie_embeddings else set()
    used = {name: x for name, x in tensors.items() if not IGNORED.fullmatch(name) and name not in tied}
    unrun = {name: shape for name, shape in unrun_shapes(config, naming).items() if name in used}
    checkpoint.check_shapes(
        torch_shapes(config, naming) | unrun,
        {name: x.shape for name, x in used.items()},
        what,
    )
    other = {name: x.dtype for name, x in used.items() if x.dtype not in FLOATS.values()}
    if other:
        name, dtype = next(iter(other.items()))
        raise UserError(
            f"{len(other)} tensors are not {', '.join(FLOATS.values())}, {name} is {dtype}: convert the "
            "checkpoint from before it was quantized"
        )
    return used
