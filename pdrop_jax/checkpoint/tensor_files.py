"""Safetensors files, read tensor by tensor: on the local disk by the library, in a bucket by ranges of bytes."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, cast

import jax.numpy as jnp
import numpy as np
from pydantic import Field
from safetensors import safe_open
from safetensors.numpy import save, save_file

from pdrop_jax.errors import UserError
from pdrop_jax.io import check_file, parse_json
from pdrop_jax.paths import BucketPath, in_bucket
from pdrop_jax.schema import validated

HEADER_BYTES = 100_000_000  # the library's own limit
METADATA = "__metadata__"
DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}  # names of safetensors

Size = Annotated[int, Field(ge=0, lt=2**63)]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is in the data of a file. It has the methods of the library's slices that are used here."""

    dtype: str
    shape: list[Size]
    data_offsets: tuple[Size, Size]

    def get_dtype(self) -> str:
        return self.dtype

    def get_shape(self) -> list[int]:
        return self.shape


class RemoteTensors:
    """A file in a bucket, with the methods of ``safe_open`` that are used here. Only its header is read at once.

    Raises:
      UserError: the file does not exist, or its header is damaged.
    """

    def __init__(self, path: BucketPath) -> None:
        self._path, size = path, check_file(cast(pathlib.Path, path))
        length = int.from_bytes(path.read_range(0, min(8, size)), "little")
        self._start = 8 + length
        if size < 8 or length > min(HEADER_BYTES, size - 8):
            raise UserError(f"{path} is damaged: its header would have {length:,} bytes; copy it again")
        header = parse_json(path.read_range(8, self._start), f"the header of {path}")
        if not isinstance(header, dict):
            raise UserError(f"{path} is damaged: its header is a {type(header).__name__}; copy it again")
        self._metadata = header.pop(METADATA, None)
        self._entries = validated(dict[str, Entry], header, f"the header of {path}")
        last = max((entry.data_offsets[1] for entry in self._entries.values()), default=0)
        if self._start + last > size or any(x.data_offsets[0] > x.data_offsets[1] for x in self._entries.values()):
            raise UserError(f"{path} is damaged: it has {size:,} bytes, its tensors end at {self._start + last:,}")

    def keys(self) -> list[str]:
        return list(self._entries)

    def metadata(self) -> dict[str, str] | None:
        where = f"the metadata of {self._path}"
        return None if self._metadata is None else validated(dict[str, str], self._metadata, where)

    def get_slice(self, name: str) -> Entry:
        return self._entries[name]

    def get_tensor(self, name: str) -> np.ndarray:
        """The values of a tensor of one of ``DTYPES``, by one request."""
        entry = self._entries[name]
        start, stop = entry.data_offsets
        dtype = np.dtype(DTYPES[entry.dtype])
        if math.prod(entry.shape) * dtype.itemsize != stop - start:
            raise UserError(f"{self._path} is damaged: {name} {entry.shape} has {stop - start:,} bytes; copy it again")
        data = self._path.read_range(self._start + start, self._start + stop) if stop > start else b""
        return np.frombuffer(data, dtype).reshape(entry.shape)


@contextlib.contextmanager
def open_tensors(path: pathlib.Path) -> Iterator[Any]:
    """The open file; raises what ``safe_open`` does, and UserError if it is not a regular file."""
    if in_bucket(path):
        yield RemoteTensors(cast(BucketPath, path))
        return
    check_file(path)
    with safe_open(path, "np") as file:
        yield file


def save_tensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a file; to a bucket from memory, in one object."""
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    if in_bucket(path):
        path.write_bytes(save(arrays, metadata))
    else:
        save_file(arrays, path, metadata)
