"""Files written by ``torch.save``, checked before torch reads them.

torch's own weights-only reader runs no code, but it allocates any size that a file names, even a bytearray of 100 GB,
and fails on damaged files with almost any exception.
"""

import functools
import pathlib
import pickle
import pickletools
import re
import warnings
import zipfile
from typing import Any, BinaryIO, cast

import ml_dtypes
import numpy as np

from pdrop_jax.convert.tensors import Tensor, Tensors
from pdrop_jax.errors import UserError
from pdrop_jax.io import check_file, local_copy
from pdrop_jax.paths import in_bucket

PICKLE_BYTES = 2**28  # names, shapes and offsets of the tensors; their values are stored elsewhere
HEADERS = 3  # pickles before the object in files older than torch 1.6: magic number, protocol, system
# The names that a dictionary of tensors needs.
ALLOWED = re.compile(
    r"collections OrderedDict|torch [A-Za-z0-9]*Storage|torch\.storage (Typed|Untyped)Storage"
    r"|torch (bool|(bfloat|float|complex|u?int)[a-z0-9_]+)|torch\._utils _rebuild_(tensor(_v2|_v3)?|parameter)"
)


def open_pickle(path: pathlib.Path) -> Tensors:
    """The tensors of a file written by ``torch.save``, mapped into memory. Code in it is refused, never run.

    Raises:
      UserError: torch is not installed; or the file is missing, damaged, larger when unpacked than on disk, or
        contains anything but a dictionary of dense tensors.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{path.name} is a pickle, which needs torch to read: pip install 'pdrop-jax[torch]'") from None
    if in_bucket(path):  # torch reads local files; what it has mapped stays when the copy is removed
        with local_copy(path.parent, [path.name], limit=None) as folder:
            return open_pickle(folder / path.name)
    size = check_file(path)
    try:
        zipped = zipfile.is_zipfile(path)
        _check(path, size, zipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about a damaged header before it fails
            # Files older than torch 1.6 are not zip archives and cannot be mapped.
            data: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it is damaged, or contains code besides tensors") from None
    except Exception as error:  # a damaged file makes torch, zipfile and pickletools raise almost anything
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path} cannot be read, download or copy it again: {reason}") from None
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise UserError(f"{path} does not contain a dictionary of tensors")
    for name, x in data.items():
        if not isinstance(x, torch.Tensor):
            raise UserError(f"{path} does not contain a dictionary of tensors: {name} is a {type(x).__name__}")
        if x.layout != torch.strided or x.device.type != "cpu" or x.is_quantized:
            raise UserError(f"{path}: {name} is a {x.layout} tensor on {x.device}, expected a dense one")

    def read(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # numpy has no such dtype
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {
        name: Tensor(tuple(x.shape), str(x.dtype).removeprefix("torch."), functools.partial(read, x.detach()))
        for name, x in data.items()
    }


def _check(path: pathlib.Path, size: int, zipped: bool) -> None:
    """Raises UserError if reading ``path`` could take more memory than its ``size``, or could run code."""
    if not zipped:
        with path.open("rb") as file:
            for number in range(HEADERS + 1):
                _check_pickle(path, file, size if number == HEADERS else None)
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise UserError(
                f"{path} is refused: its {size:,} bytes unpack to {unpacked:,}, but torch.save does not compress"
            )
        pickles = [member for member in members if member.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES:
            raise UserError(f"{path} is refused: torch.save writes one data.pkl of at most {PICKLE_BYTES:,} bytes")
        with archive.open(pickles[0]) as file:
            _check_pickle(path, file, size)


def _check_pickle(path: pathlib.Path, file: Any, largest: int | None) -> None:
    """Reads one pickle without building anything.

    Args:
      largest: upper bound of the numbers in it: no element count, shape or stride exceeds the bytes of the file.
    """
    for opcode, argument, _ in pickletools.genops(cast(BinaryIO, _Bounded(file))):
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):  # torch.save writes protocol 2
            raise pickle.UnpicklingError(opcode.name)
        if opcode.name == "GLOBAL" and not ALLOWED.fullmatch(str(argument)):
            found = str(argument).replace(" ", ".")
            raise UserError(f"{path} is refused: it is damaged, or contains code besides tensors: it names {found}")
        if largest is not None and isinstance(argument, int) and abs(argument) > largest:
            raise UserError(f"{path} is refused: it names {argument:,} elements, but has {largest:,} bytes")


class _Bounded:
    """A file for pickletools that refuses reads larger than a pickle may be, which would allocate that much."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, n: int) -> bytes:
        if n > PICKLE_BYTES:
            raise pickle.UnpicklingError(f"a string of {n:,} bytes")
        return self._file.read(n)

    def readline(self) -> bytes:
        return self._file.readline(PICKLE_BYTES)
