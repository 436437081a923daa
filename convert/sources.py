"""What a conversion reads: a PyTorch LLaVA checkpoint, or the parts for a new one."""

import dataclasses
import os
import pathlib
from typing import Any

from pdrop_jax import checkpoint
from pdrop_jax.config import FORMAT, LlavaConfig, read_config
from pdrop_jax.convert.files import read_folder
from pdrop_jax.convert.hf_config import llava_from_hf, namings_for
from pdrop_jax.convert.hf_parts import FAMILIES, ORIGINAL_TYPES, vision_from_hf
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
from pdrop_jax.errors import UserError
from pdrop_jax.io import read_json
from pdrop_jax.schedule import DropSchedule


@dataclasses.dataclass(frozen=True)
class Source:
    """A PyTorch checkpoint whose tensors were checked against its config.

    Attributes:
      folder: contains config.json and the tokenizer.
      config: with the schedule of the converted checkpoint.
      naming: names of its tensors.
      tensors: those that run, and the unused ones of the vision tower.
      tower: folder of the vision tower, if it is separate.
    """

    folder: pathlib.Path
    config: LlavaConfig
    naming: Naming
    tensors: Tensors
    tower: pathlib.Path | None


def open_source(
    folder: pathlib.Path,
    vision: pathlib.Path | None = None,
    schedule: DropSchedule | None = None,
    *,
    projector: pathlib.Path | None = None,
) -> Source:
    """Opens a PyTorch checkpoint and compares the names and shapes of its tensors with its config.

    Args:
      vision: folder of the vision tower, for an original checkpoint without one.
      projector: file of a projector that replaces the checkpoint's.

    Raises:
      UserError: ``folder`` is not a checkpoint, is damaged, or something in it is not supported. All tensors that are
        missing, unexpected or of another shape are listed.
    """
    data = _read_config(folder)
    original = original_type(data) is not None
    if data.get("model_type") in tuple(FAMILIES):
        raise UserError(f"{folder} is a language model: to build a LLaVA from it, use --llm {folder} --vision DIR OUT")
    if vision and not original:
        raise UserError(
            f"{folder} already contains its vision tower: --vision is for original LLaVA checkpoints without one"
        )
    tower = vision or _find_tower(folder, data.get("mm_vision_tower"))
    config = llava_from_hf(
        data,
        vision=vision_from_hf(read_config(tower), str(tower / "config.json")) if tower else None,
        generation=_optional_json(folder / "generation_config.json"),
        preprocessor=_image_processor(folder),
        schedule=schedule,
        where=str(folder / "config.json"),
    )
    tensors = read_folder(folder)
    namings = {key: naming for key, naming in namings_for(config).items() if key.startswith("original") == original}
    naming = namings[closest(config, tensors, namings)]
    if original and not any(name.startswith(naming.vision) for name in tensors):
        if tower is None:
            name = data.get("mm_vision_tower")
            raise UserError(
                f"{folder} contains no vision tower and {name} was not found: pass its folder, --vision DIR"
            )
        tensors |= _tower_tensors(config, tower, naming)
    if original and config.vision.kind == "siglip":
        config = _as_saved(config, naming, tensors)
    if projector is not None:
        tensors |= read_projector(projector, config, naming)
    what = f"{folder} does not contain the model that its config.json describes"
    return Source(folder, config, naming, _check_tensors(config, naming, tensors, what), tower)


def open_parts(
    llm: pathlib.Path,
    vision: pathlib.Path,
    schedule: DropSchedule | None = None,
    *,
    projector: pathlib.Path | None = None,
    projector_layers: int | None = None,
    seed: int = 0,
) -> Source:
    """A LLaVA made of a language model, a vision tower and a projector, as if it were an original checkpoint.

    Everything else is as in LLaVA-1.5: patch features of the second-last layer, images padded to squares.

    Args:
      llm: folder of a causal language model of one of the ``FAMILIES``, such as Vicuna.
      vision: folder of a CLIP or SigLIP vision tower.
      projector: its file; None initializes a new one.
      projector_layers: 1 is linear, 2 an MLP; None is that of ``projector``, or 2 for a new one.
      seed: RNG seed of a new projector.

    Raises:
      UserError: as ``open_source``.
    """
    data = _read_config(llm)
    if data.get("model_type") not in tuple(FAMILIES):
        known = " or ".join(FAMILIES)
        raise UserError(f"--llm takes a {known} language model, {llm} has model_type {data.get('model_type')!r}")
    tower = vision_from_hf(read_config(vision), str(vision / "config.json"))
    layers = projector_layers or (num_layers(open_projector(projector)) if projector else 2)
    llava = {
        "model_type": ORIGINAL_TYPES[data["model_type"]],
        "image_aspect_ratio": "pad",
        "mm_hidden_size": tower.hidden_size,
        "mm_projector_type": projector_type(layers),
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
    }
    generation = _optional_json(llm / "generation_config.json")
    config = llava_from_hf(
        data | llava, vision=tower, generation=generation, schedule=schedule, where=str(llm / "config.json")
    )
    naming = NAMINGS["original-linear" if layers == 1 else "original"]
    tensors = read_folder(llm)
    if tensors.keys() & projector_shapes(config, naming):
        raise UserError(f"{llm} already contains a projector: move it elsewhere and pass its file, --projector FILE")
    tensors |= _tower_tensors(config, vision, naming)
    tensors |= read_projector(projector, config, naming) if projector else fresh_projector(config, naming, seed)
    what = f"{llm} and {vision} do not contain the models that their config.json files describe"
    return Source(llm, config, naming, _check_tensors(config, naming, tensors, what), vision)


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    data = read_config(folder)
    if data.get("format") == FORMAT:
        raise UserError(f"{folder} is already converted")
    return data


def _find_tower(folder: pathlib.Path, name: Any) -> pathlib.Path | None:
    places = [folder / name, folder.absolute().parent / name] if name and isinstance(name, str) else []
    return next((place for place in places if os.path.isfile(place / "config.json")), None)


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
