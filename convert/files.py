"""PyTorch checkpoint files: read lazily, names and shapes first and values on demand; and written."""

import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Annotated

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open

from pdrop_jax.checkpoint.tensor_files import RemoteTensors, save_tensors
from pdrop_jax.convert.hf_schema import Section
from pdrop_jax.convert.pickles import open_pickle
from pdrop_jax.convert.tensors import FLOATS, Tensor, Tensors
from pdrop_jax.errors import UserError
from pdrop_jax.io import check_file, read_json
from pdrop_jax.paths import BucketPath
from pdrop_jax.schema import validated

# Weight files in order of preference. A file may be split into parts, which its index lists.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PROJECTOR = "mm_projector.bin"  # original LLaVA: the result of pretraining, beside the weights of a language model


class Index(Section):
    """The file of each tensor; only files in the same folder are allowed."""

    weight_map: Annotated[dict[str, Annotated[str, Field(pattern=r"^[^/\\]+$")]], Field(min_length=1)]


def read_folder(folder: pathlib.Path) -> Tensors:
    """Every tensor of a checkpoint folder by name.

    Raises:
      UserError: no weights, a missing or damaged file, or a pickle that contains more than tensors.
    """
    name = find_weights(lambda name: (folder / name).exists())
    if name is None:
        raise UserError(f"{folder} is not a checkpoint: it has neither {' nor '.join(WEIGHTS)}, whole or in parts")
    open_file = open_safetensors if name.endswith(".safetensors") else open_pickle
    tensors = {key: tensor for path in _parts(folder, name) for key, tensor in open_file(path).items()}
    if (folder / PROJECTOR).exists():
        tensors = open_pickle(folder / PROJECTOR) | tensors
    return tensors


def write_safetensors(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes ``arrays``. OSError if the disk is full or not writable."""
    try:
        # transformers refuses files without the format.
        save_tensors(path, arrays, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def find_weights(exists: Callable[[str], bool]) -> str | None:
    """The format of ``WEIGHTS`` that a checkpoint is read from, whole or in parts; None if it has no weights."""
    return next((name for name in WEIGHTS if exists(name) or exists(index_of(name))), None)


def index_of(weights: str) -> str:
    """Name of the file that lists the parts of ``weights``."""
    return f"{weights}.index.json"


def part_names(folder: pathlib.Path, weights: str) -> list[str]:
    """Names of the files that the index lists. UserError if it is damaged."""
    index = folder / index_of(weights)
    return sorted(set(validated(Index, read_json(index), str(index)).weight_map.values()))


def _parts(folder: pathlib.Path, name: str) -> Iterable[pathlib.Path]:
    if not (folder / index_of(name)).exists():
        return [folder / name]
    names = part_names(folder, name)
    there = {path.name for path in folder.iterdir()}
    missing = [part for part in names if part not in there]
    if missing:
        raise UserError(
            f"{folder} is incomplete: {index_of(name)} lists {len(names)} files, missing {' '.join(missing)}"
        )
    return [folder / part for part in names]


def open_safetensors(path: pathlib.Path) -> Tensors:
    """The tensors of a safetensors file, which stays open as long as one of them is referenced."""
    check_file(path)
    try:
        file = RemoteTensors(path) if isinstance(path, BucketPath) else safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read, download or copy it again: {error}") from None
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return {
        name: Tensor(
            tuple(part.get_shape()),
            FLOATS.get(part.get_dtype(), part.get_dtype()),
            functools.partial(file.get_tensor, name),
        )
        for name, part in slices.items()
    }
