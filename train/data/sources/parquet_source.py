"""Parquet as Hugging Face's datasets write it: columns of conversations or messages, and pictures as bytes."""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.io import inside
from pdrop_jax.train.data.sources.files import check_format, open_binary, reading
from pdrop_jax.train.data.sources.source import PICTURE_BYTES, Place, Source

TEXTS = ("id", "conversations", "messages")
PICTURES = ("image", "images")
BATCH = 256  # rows whose texts are decoded at a time
OPEN_FILES = 32
GROUP_BYTES = 2**31  # most bytes of a row group's texts, or of its pictures, which are decoded together


class ParquetSource(Source):
    """Parquet files. A picture is read with the others of its row group, and the last row group is kept.

    That is fast in order. At random, each picture costs a row group, so row groups should be small (datasets writes 100
    rows), or the data packed first.
    """

    def __init__(self, path: str, files: list[str], images: str) -> None:
        super().__init__(path, files, images)
        import_pyarrow()

    def make_caches(self) -> None:
        self._lock = threading.Lock()
        self._open = functools.lru_cache(OPEN_FILES)(self._open_file)
        self._column = functools.lru_cache(1)(self._read_column)

    def records(self) -> Iterator[Any]:
        for number, path in enumerate(self.files):
            check_format(path, "Parquet")
            with _reading(path):
                yield from self._records(number)

    def extract(self, *place: int) -> str | bytes:
        number, group, row, column, which = place
        with _reading(self.files[number]), self._lock:
            found = self._column(number, group, PICTURES[column])[row].as_py()
        if isinstance(found, list):
            found = found[which]
        if isinstance(found, Mapping):
            name = found.get("path")
            found = found.get("bytes")
            if found is None and isinstance(name, str) and inside(self.images, name):
                return super().read(f"./{name}")
        if not isinstance(found, bytes) or len(found) > PICTURE_BYTES:
            what = f"of {len(found):,} bytes, expected at most {PICTURE_BYTES:,}" if found else "without bytes"
            raise UserError(f"{self.files[number]}, row group {group}, row {row}: has a picture {what}")
        return found

    def _records(self, number: int) -> Iterator[Any]:
        file = self._open(number)
        leaves = _leaves(file)
        tops = list(dict.fromkeys(map(_top, leaves)))
        if not {"conversations", "messages"} & set(tops):
            raise UserError(
                f"{self.files[number]} is a Parquet file with the columns {', '.join(tops)[:200]}, but training "
                "records have conversations or messages"
            )
        # Of a picture's struct all but the bytes is read: that tells whether there is one, and costs nothing.
        read = [leaf for leaf in leaves if _top(leaf) in TEXTS or (_top(leaf) in PICTURES and not _is_bytes(leaf))]
        for group in range(file.num_row_groups):
            self._check_size(number, group, read)
            row = 0
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=read, use_threads=False):
                for record in batch.to_pylist():
                    yield _with_places(record, number, group, row)
                    row += 1

    def _read_column(self, number: int, group: int, column: str) -> Any:
        file = self._open(number)
        self._check_size(number, group, [leaf for leaf in _leaves(file) if _top(leaf) == column])
        return file.read_row_group(group, [column], use_threads=False)[column]

    def _open_file(self, number: int) -> Any:
        return import_pyarrow().ParquetFile(open_binary(self.files[number]), page_checksum_verification=True)

    def _check_size(self, number: int, group: int, leaves: Sequence[str]) -> None:
        found = self._open(number).metadata.row_group(group)
        columns = [found.column(n) for n in range(found.num_columns)]
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema in leaves)
        if not 0 <= size <= GROUP_BYTES:
            names = ", ".join(sorted(set(map(_top, leaves))))
            raise UserError(
                f"{self.files[number]}: row group {group} has {size:,} bytes in {names}, "
                f"expected at most {GROUP_BYTES:,}: write it with smaller row groups"
            )


def import_pyarrow() -> Any:
    """The module pyarrow.parquet. Raises UserError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "reading Parquet needs pyarrow, which is not installed: pip install 'pdrop-jax[parquet]'"
        ) from None
    return pyarrow.parquet


def _leaves(file: Any) -> list[str]:
    """Paths of the columns that are stored, such as "image.bytes" and "image.path"."""
    return [file.schema.column(n).path for n in range(len(file.schema))]


def _top(leaf: str) -> str:
    return leaf.partition(".")[0]


def _is_bytes(leaf: str) -> bool:
    return leaf.endswith(".bytes")


def _with_places(record: dict[str, Any], number: int, group: int, row: int) -> dict[str, Any]:
    """``record`` with a Place for each picture whose bytes are in the file."""

    def placed(entry: Any, column: int, which: int) -> Any:
        return Place.of(number, group, row, column, which) if isinstance(entry, Mapping | bytes) else entry

    for column, name in enumerate(PICTURES):
        found = record.get(name)
        record[name] = (
            [placed(entry, column, which) for which, entry in enumerate(found)]
            if isinstance(found, list)
            else placed(found, column, 0)
        )
    return record


def _reading(path: str) -> contextlib.AbstractContextManager[None]:
    import pyarrow

    return reading(path, (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError))
