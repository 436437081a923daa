"""PyTorch checkpoint -> ours, one array at a time."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from pdrop_jax import checkpoint
from pdrop_jax.config import FORMAT, LlavaConfig, VisionConfig, read_json
from pdrop_jax.errors import UserError
from pdrop_jax.model.layers import Params
from pdrop_jax.schedule import DropSchedule

from .files import DTYPES, FLOATS, DType, Tensors, read_folder, write_safetensors
from .names import IGNORED, NAMINGS, TOWERS, Leaf, Naming, closest, leaves, torch_shapes, unrun_shapes


@dataclasses.dataclass(frozen=True)
class Source:
    """A PyTorch checkpoint whose tensors are known to be those of its config.

    Attributes:
      config: with the schedule that the converted checkpoint gets.
      naming: how its tensors are called.
      tensors: the tensors that run, and those of the vision tower that do not.
      tower: folder of the vision tower, if it has one of its own.
    """

    folder: pathlib.Path
    config: LlavaConfig
    naming: Naming
    tensors: Tensors
    tower: pathlib.Path | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion wrote."""

    config: LlavaConfig
    dtype: str
    tensors: int  # of PyTorch
    bytes: int
    has_tokenizer: bool


def convert(
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    vision: pathlib.Path | None = None,
    tokenizer: pathlib.Path | None = None,
    dtype: DType | None = None,
    schedule: DropSchedule | None = None,
) -> Summary:
    """Writes checkpoint ``out`` from the PyTorch checkpoint ``source``.

    Peak memory is that of the largest array of ours, its largest PyTorch tensor and orbax's buffers.

    Args:
      vision: folder of the vision tower, for an original checkpoint that holds none.
      tokenizer: folder of the tokenizer; None is ``source``.
      dtype: of the arrays; None is float32 if the source is, otherwise bfloat16.
      schedule: saved with the checkpoint; None as in ``LlavaConfig.from_hf``.

    Raises:
      UserError: ``out`` exists, or ``source`` cannot be converted; nothing is written.
      OSError: the disk is full or may not be written; nothing is left behind.
    """
    opened = open_source(source, vision, schedule)
    config, tensors = opened.config, opened.tensors
    arrays = leaves(config, opened.naming)
    if dtype is None:
        embedding = next(leaf.names[0] for leaf in arrays if leaf.path == "embed.embedding")
        dtype = "float32" if tensors[embedding].dtype == "float32" else "bfloat16"
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    with checkpoint.new_folder(out, sum(math.prod(x.shape) for x in tensors.values()) * itemsize) as new:
        _copy_companions(opened, tokenizer, new)
        checkpoint.save_arrays(new, _stacks(arrays, tensors, dtype))
        _write_unrun(opened, new / checkpoint.UNUSED, dtype)
        config.save(new)
        return Summary(
            config,
            dtype,
            tensors=len(tensors),
            bytes=sum(path.stat().st_size for path in new.rglob("*") if path.is_file()),
            has_tokenizer=any(any(new.glob(pattern)) for pattern in checkpoint.TOKENIZER),
        )


def read(
    source: pathlib.Path, schedule: DropSchedule | None = None, dtype: DType = "float32"
) -> tuple[LlavaConfig, Params]:
    """The model of a PyTorch checkpoint, in memory and not on disk. Raises UserError as ``convert`` does."""
    opened = open_source(source, schedule=schedule)
    arrays = _stacks(leaves(opened.config, opened.naming), opened.tensors, dtype)
    return opened.config, unflatten_dict(dict(arrays), sep=".")


def open_source(
    folder: pathlib.Path, vision: pathlib.Path | None = None, schedule: DropSchedule | None = None
) -> Source:
    """Opens a PyTorch checkpoint and compares the names and shapes of its tensors with its config.

    Raises:
      UserError: it is none, it is damaged, or something in it is not supported; tensors that are missing, unexpected
        or of another shape are all named.
    """
    data = read_json(folder / "config.json")
    if data.get("format") == FORMAT:
        raise UserError(f"{folder} is converted already")
    original = data.get("model_type") == "llava_llama"
    if vision and not original:
        raise UserError(f"{folder} holds its vision tower: --vision is for original LLaVA checkpoints without one")
    tower = vision or _find_tower(folder, data.get("mm_vision_tower"))
    config = LlavaConfig.from_hf(
        data,
        vision=VisionConfig.from_hf(read_json(tower / "config.json")) if tower else None,
        generation=_optional_json(folder / "generation_config.json"),
        preprocessor=_image_processor(folder),
        schedule=schedule,
    )
    tensors = read_folder(folder)
    namings = {key: naming for key, naming in NAMINGS.items() if key.startswith("original") == original}
    naming = namings[closest(config, tensors, namings)]
    if original and not any(name.startswith(naming.vision) for name in tensors):
        if tower is None:
            name = data.get("mm_vision_tower")
            raise UserError(f"{folder} holds no vision tower and {name} is not at hand: pass its folder, --vision DIR")
        tensors |= _tower_tensors(config, tower, naming)
    return Source(folder, config, naming, _check_tensors(folder, config, naming, tensors), tower)


def _find_tower(folder: pathlib.Path, name: str | None) -> pathlib.Path | None:
    places = [folder / name, folder.absolute().parent / name] if name else []
    return next((place for place in places if (place / "config.json").is_file()), None)


def _image_processor(folder: pathlib.Path) -> dict[str, Any] | None:
    own = _optional_json(folder / "preprocessor_config.json")
    return own or (_optional_json(folder / "processor_config.json") or {}).get("image_processor")


def _optional_json(path: pathlib.Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _tower_tensors(config: LlavaConfig, folder: pathlib.Path, naming: Naming) -> Tensors:
    """The tensors of a tower's own folder under the names that they have inside a whole checkpoint."""
    tensors = read_folder(folder)
    prefix = TOWERS[closest(config, tensors, TOWERS)].vision
    return {
        naming.vision + name.removeprefix(prefix)
        if name.startswith(prefix) and not IGNORED.fullmatch(name)
        else name: x
        for name, x in tensors.items()
    }


def _check_tensors(folder: pathlib.Path, config: LlavaConfig, naming: Naming, tensors: Tensors) -> Tensors:
    """``tensors`` without those that are known to be in no model. Raises UserError."""
    tied = {naming.head} if config.text.tie_embeddings else set()
    used = {name: x for name, x in tensors.items() if not IGNORED.fullmatch(name) and name not in tied}
    unrun = {name: shape for name, shape in unrun_shapes(config, naming).items() if name in used}
    checkpoint.check_shapes(
        torch_shapes(config, naming) | unrun,
        {name: x.shape for name, x in used.items()},
        f"{folder} does not hold the model that its config.json describes",
    )
    other = {name: x.dtype for name, x in used.items() if x.dtype not in FLOATS.values()}
    if other:
        name, dtype = next(iter(other.items()))
        raise UserError(
            f"{len(other)} tensors are not {', '.join(FLOATS.values())}, {name} is {dtype}: convert the checkpoint as "
            "it was before it was quantised"
        )
    return used


def _stacks(arrays: list[Leaf], tensors: Tensors, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    for leaf in tqdm(arrays, unit="array", disable=None):
        yield leaf.path, _stack(leaf, tensors, dtype)


def _stack(leaf: Leaf, tensors: Tensors, dtype: str) -> np.ndarray:
    result = np.empty(leaf.shape, DTYPES[dtype])
    for part, name in zip(result if leaf.stacked else [result], leaf.names, strict=True):
        part[...] = leaf.transform.to_ours(tensors[name].read(), leaf.part_shape)
    return result


def _write_unrun(source: Source, path: pathlib.Path, dtype: str) -> None:
    names = [name for name in unrun_shapes(source.config, source.naming) if name in source.tensors]
    prefix = source.naming.vision
    write_safetensors(
        path, {name.removeprefix(prefix): source.tensors[name].read().astype(DTYPES[dtype]) for name in names}
    )


def _copy_companions(source: Source, tokenizer: pathlib.Path | None, new: pathlib.Path) -> None:
    if tokenizer is not None and not any(any(tokenizer.glob(pattern)) for pattern in checkpoint.TOKENIZER):
        raise UserError(f"{tokenizer} holds no tokenizer files")
    checkpoint.copy_files(tokenizer or source.folder, new, checkpoint.TOKENIZER)
    for folder in filter(None, (source.folder, source.tower)):
        checkpoint.copy_files(folder, new, checkpoint.PROCESSOR)
