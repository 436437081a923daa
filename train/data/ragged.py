"""Rows of different lengths in one flat array that worker processes share."""

import array
import os
import sys
import tempfile
import threading
from typing import Any, BinaryIO

import numpy as np

from pdrop_jax.errors import UserError

_WRITING = threading.Lock()  # grain pickles for each worker in a separate thread, and all must use the same file


class Ragged:
    """Rows of integers, concatenated in ``values``; row i is ``values[ends[i]:ends[i + 1]]``.

    On Linux, pickling stores the path of a file that both processes map into memory, not the values. The file is
    unlinked, so it disappears with the process that created it, even if that is killed.

    Attributes:
      values: (total,) array of any integer dtype.
      ends: (rows + 1,) int64, starting with 0.
    """

    def __init__(self, values: np.ndarray, ends: np.ndarray) -> None:
        self.values, self.ends = values, ends
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.ends[row] : self.ends[row + 1]]

    def __deepcopy__(self, _memo: dict) -> "Ragged":
        # grain copies the pipeline for each worker before pickling it; all copies share one file.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if sys.platform != "linux":
            return Ragged, (self.values, self.ends)
        with _WRITING:
            if self._file is None:
                self._file = self._write()
        name = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        return _map, (name, len(self.ends), self.values.dtype.str)

    def _write(self) -> BinaryIO:
        size = self.ends.nbytes + self.values.nbytes
        try:
            file: Any = tempfile.TemporaryFile()  # noqa: SIM115
            file.write(self.ends.data)
            file.write(self.values.data)
            file.flush()
        except OSError as error:
            raise UserError(
                f"the index for worker processes ({size / 1e6:.0f} MB) cannot be written to {tempfile.gettempdir()} "
                f"({error.strerror}): set TMPDIR to another folder, or data.workers to 0"
            ) from None
        return file


def _map(name: str, num_ends: int, dtype: str) -> Ragged:
    raw = np.asarray(np.memmap(name, mode="r"))
    ends = raw[: 8 * num_ends].view(np.int64)
    return Ragged(raw[8 * num_ends :].view(dtype), ends)


class RaggedBuilder:
    """Builds a ``Ragged`` row by row, without a second copy of the values."""

    def __init__(self, dtype: type[np.integer]) -> None:
        self.dtype = np.dtype(dtype)
        self._values = array.array("b")
        self._ends = array.array("q", [0])

    def append(self, row: np.ndarray) -> None:
        self._values.frombytes(np.asarray(row, self.dtype).tobytes())
        self._ends.append(len(self._values) // self.dtype.itemsize)

    def build(self) -> Ragged:
        """The collected rows. Nothing can be appended afterwards."""
        return Ragged(np.frombuffer(self._values, self.dtype), np.frombuffer(self._ends, np.int64))
