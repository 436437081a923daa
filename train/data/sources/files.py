"""Which files a path names, and what they are by their first bytes. Everything that is opened here is a local file."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import BinaryIO, Literal, get_args

from pdrop_jax.errors import UserError, one_line
from pdrop_jax.io import check_file
from pdrop_jax.paths import as_path, lexists

Format = Literal["JSON", "Parquet", "tar", "ArrayRecord"]

SUFFIXES: dict[str, Format] = {
    ".arrayrecord": "ArrayRecord",
    ".array_record": "ArrayRecord",
    ".parquet": "Parquet",
    ".tar": "tar",
    ".jsonl": "JSON",
    ".json": "JSON",
}
HEAD = 512  # bytes that are read to recognise a format
EXPECTED = "expected JSON, JSON Lines, Parquet, WebDataset tar files or shards of pdrop data pack"

# Offset, first bytes and format. The names of formats that are not read include what to do.
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PAR1", "Parquet"),
    (257, b"ustar", "tar"),
    (0, bytes(HEAD), "tar"),  # an empty one
    (0, bytes.fromhex("83af70d10d884a3f"), "ArrayRecord"),  # the start of every file of Riegeli records
    (0, b"\x1f\x8b", "a gzip file, which cannot be read at random: unpack it with gunzip"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file, which cannot be read at random: unpack it with unzstd"),
    (0, b"\xfd7zXZ\0", "an xz file, which cannot be read at random: unpack it with unxz"),
    (0, b"BZh", "a bzip2 file, which cannot be read at random: unpack it with bunzip2"),
    (0, b"PK\x03\x04", "a ZIP archive: unpack it"),
    (0, b"ARROW1", "an Arrow file: write Parquet with Dataset.to_parquet"),
    (0, b"\xff\xff\xff\xff", "an Arrow file: write Parquet with Dataset.to_parquet"),
    (0, b"version https://git-lfs", "a Git LFS pointer in place of the file: run git lfs pull"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"SQLite format 3", "an SQLite data base"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"%PDF", "a PDF"),
    (0, b"\x80\x04", "a pickle"),
    (0, b"\x80\x05", "a pickle"),
)
_NAMED = {"Parquet": "a Parquet file", "tar": "a tar archive", "ArrayRecord": "an ArrayRecord file", "JSON": "JSON"}
_SHARD = re.compile(r"(.*?)-?(\d{4,6})-of-(\d{4,6})\b")


def open_binary(path: str | os.PathLike) -> BinaryIO:
    """The contents of a regular file. Raises UserError as ``check_file`` does."""
    check_file(path)
    try:
        return as_path(path).open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def reading(path: str, errors: tuple[type[Exception], ...], make: str = "write") -> Iterator[None]:
    """Turns the ``errors`` that a library raises on a damaged file into a UserError.

    Args:
      make: the verb that tells how to make the file again, such as "pack".
    """
    try:
        yield
    except UserError:
        raise
    except errors as error:
        reason = one_line(error, 200)
        raise UserError(f"{path} is damaged or was cut short ({reason}): {make} or download it again") from None


def format_of(path: str | os.PathLike) -> Format:
    """The format of a file, by its first bytes; a text file is JSON.

    Raises:
      UserError: the file cannot be read, is empty, or has another format, which is named; or its name ends like that of
        a format that it does not have.
    """
    with open_binary(path) as file:
        head = file.read(HEAD)
    if not head.strip():
        raise UserError(f"{path} is empty: {EXPECTED}")
    found = next((name for at, magic, name in _MAGIC if head[at : at + len(magic)] == magic), None)
    named = SUFFIXES.get(pathlib.Path(path).suffix, "JSON")
    if found is None and named != "JSON":
        raise UserError(f"{path} does not start like {_NAMED[named]}: it was cut short, is damaged or has a wrong name")
    if found is None:
        found = "a binary file of an unknown format" if b"\0" in head else "JSON"
    if found not in get_args(Format):
        raise UserError(f"{path} is {found}" + ("" if ":" in found else f": {EXPECTED}"))
    return found  # type: ignore[return-value]


def check_format(path: str | os.PathLike, expected: Format) -> None:
    """Raises UserError if a shard does not have the format of the others."""
    if (found := format_of(path)) != expected:
        raise UserError(f"{path} is {_NAMED[found]}, but the files beside it are {expected}: remove it")


def files_of(path: str) -> list[str]:
    """The files of a data set, in the order in which their records are numbered.

    Args:
      path: a file; a pattern, such as ``data/train-*.parquet``; or a folder, of which only the shards are taken: files
        that end in one of SUFFIXES. JSON files count only where there are no others, because folders of shards have
        JSON files that describe them.

    Raises:
      UserError: there are no files, or files of several formats or splits, or shards are missing by their names.
    """
    place = as_path(path)
    if place.is_dir():
        found = _shards_in(place)
    elif set(place.name) & set("*?[") and not lexists(path):
        found = sorted(entry for entry in place.parent.glob(place.name) if entry.is_file())
        if not found:
            raise UserError(f"{path} matches no files")
    else:
        return [path]
    _check_complete(path, found)
    return [str(entry) for entry in found]


def _shards_in(folder: pathlib.Path) -> list[pathlib.Path]:
    entries = sorted(entry for entry in folder.iterdir() if entry.suffix in SUFFIXES and not entry.name.startswith("."))
    entries = [entry for entry in entries if SUFFIXES[entry.suffix] != "JSON"] or entries
    formats = sorted({SUFFIXES[entry.suffix] for entry in entries})
    if not entries:
        below = next((child for child in sorted(folder.iterdir()) if child.is_dir() and _has_shards(child)), None)
        hint = f"did you mean {below}?" if below else f"expected files that end in {', '.join(SUFFIXES)}"
        raise UserError(f"{folder} holds no training data: {hint}")
    if len(formats) > 1:
        raise UserError(
            f"{folder} holds files of several formats ({', '.join(formats)}): name one, such as {entries[0]}"
        )
    splits = sorted({found[1] for entry in entries if (found := _SHARD.match(entry.name))})
    if len(splits) > 1:
        raise UserError(
            f"{folder} holds several sets of shards ({', '.join(splits)}): choose one, such as "
            f"{folder / splits[-1]}-*{entries[0].suffix}"
        )
    return entries


def _has_shards(folder: pathlib.Path) -> bool:
    return any(entry.suffix in SUFFIXES for entry in folder.iterdir())


def _check_complete(path: str, entries: list[pathlib.Path]) -> None:
    """Raises UserError if names such as 00003-of-00010 say that shards are missing."""
    named = [found for entry in entries if (found := _SHARD.match(entry.name))]
    for split, total in {(found[1], found[3]) for found in named}:
        there = {int(found[2]) for found in named if (found[1], found[3]) == (split, total)}
        if missing := sorted(set(range(int(total))) - there):
            raise UserError(
                f"{path} lacks {len(missing)} of {int(total)} shards, the first is number {missing[0]}: "
                "complete the download"
            )
