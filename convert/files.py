"""PyTorch checkpoint files: read lazily, names and shapes first, numbers when they are asked for; and written."""

import dataclasses
import functools
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pdrop_jax import storage
from pdrop_jax.errors import UserError
from pdrop_jax.io import read_json

from .names import Shape

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
FLOATS = {name: np.dtype(dtype).name for name, dtype in storage.DTYPES.items()}  # of safetensors' names
# The weights of a folder, best first. A file may be split; then its index lists the parts.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PROJECTOR = "mm_projector.bin"  # original LLaVA: what pretraining trained, the rest being a language model's


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. ``dtype`` is a numpy name; ``read`` gives the array."""

    shape: Shape
    dtype: str
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def read_folder(folder: pathlib.Path) -> Tensors:
    """Every tensor of a checkpoint folder by name.

    Raises:
      UserError: no weights, a missing or damaged file, a pickle that holds more than tensors.
    """
    name = next((n for n in WEIGHTS if (folder / n).exists() or (folder / f"{n}.index.json").exists()), None)
    if name is None:
        raise UserError(f"{folder} is no checkpoint: it has neither {' nor '.join(WEIGHTS)}, whole or in parts")
    open_file = open_safetensors if name.endswith(".safetensors") else open_pickle
    tensors = {key: tensor for path in _parts(folder, name) for key, tensor in open_file(path).items()}
    if (folder / PROJECTOR).exists():
        tensors = open_pickle(folder / PROJECTOR) | tensors
    return tensors


def write_safetensors(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes ``arrays``. OSError if the disk is full or may not be written."""
    try:
        # Without the format transformers does not know whose file it is.
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def _parts(folder: pathlib.Path, name: str) -> Iterable[pathlib.Path]:
    index = folder / f"{name}.index.json"
    if not index.exists():
        return [folder / name]
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    missing = [part for part in names if not (folder / part).is_file()]
    if missing or not names:
        raise UserError(f"{folder} is incomplete: {index.name} lists {len(names)} files, missing {' '.join(missing)}")
    return [folder / part for part in names]


def open_safetensors(path: pathlib.Path) -> Tensors:
    """The tensors of a safetensors file, which stays open as long as any of them lives."""
    try:
        file = safe_open(path, "np")
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


def open_pickle(path: pathlib.Path) -> Tensors:
    """The tensors of a file that ``torch.save`` wrote, mapped into memory. Code in it is refused, never run."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path.name} is a pickle, reading it needs torch: pip install 'pdrop-jax[torch]'") from None
    try:
        # Files of before torch 1.6 are no zip archives and cannot be mapped.
        data: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it is damaged, or holds code and not only tensors") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read, download or copy it again: {reason}") from None
    if not isinstance(data, dict) or not all(isinstance(value, torch.Tensor) for value in data.values()):
        raise UserError(f"{path} holds no dictionary of tensors")

    def read(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # numpy has none of its own
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {
        name: Tensor(tuple(x.shape), str(x.dtype).removeprefix("torch."), functools.partial(read, x.detach()))
        for name, x in data.items()
    }
