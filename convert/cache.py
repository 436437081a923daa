"""Converted models that are kept for the next time: a PyTorch checkpoint is converted when it is first used.

::

    ~/.cache/pdrop/models-1/       or $PDROP_CACHE/models-1; the number changes with what a conversion writes
        3f786850e387550f-bfloat16/
            llava-1.5-7b-hf/       the converted model
            entry.json             where it comes from, written last: a folder without it is not a model
        locks/3f786850e387550f     held by the process that converts

A checkpoint on the Hub is known by its commit, a folder by its path and by names, sizes, times and edges of its files.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import filelock
import jax
import numpy as np

from pdrop_jax.cache_folder import cache_folder
from pdrop_jax.convert.hub import Location, fetch_all, hub_id, locate
from pdrop_jax.convert.importer import default_dtype, write
from pdrop_jax.convert.sources import open_source
from pdrop_jax.convert.tensors import DTYPES, DType
from pdrop_jax.convert.towers import find_tower
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import read_json, write_file
from pdrop_jax.schema import validated

VERSION = 1  # raised when a conversion writes something else, so that models of an earlier version are not used
ENTRY = "entry.json"
EDGE_BYTES = 2**16  # of the start and the end of a file, which are part of the fingerprint of a folder


@dataclasses.dataclass(frozen=True)
class Entry:
    """A converted model.

    Attributes:
      source: repository on the Hub, or the path of a folder.
      revision: branch, tag or commit that was asked for; None is the main branch, or a folder.
      key: hash of the commit, or fingerprint of a folder.
      dtype: of the arrays.
      default: whether it is the dtype that a conversion chooses by itself.
      name: of the folder with the model.
    """

    source: str
    revision: str | None
    key: str
    dtype: str
    default: bool
    name: str


def root() -> pathlib.Path:
    """The folder of all entries; a local one, because a bucket has no locks."""
    return pathlib.Path(cache_folder(f"models-{VERSION}", local=True)).absolute()


def model_folder(name: str | os.PathLike, dtype: Any = None) -> str | os.PathLike:
    """The folder of the model that a user names, converted if it has to be.

    Args:
      name: folder of a converted or trained model, which is returned as it is; or folder or Hub id of a PyTorch
        checkpoint, which is converted into the cache unless it is there.
      dtype: of the arrays that are loaded from it; None is the checkpoint's.

    Raises:
      UserError: the checkpoint cannot be downloaded or converted; nothing is left in the cache.
      OSError: the disk is full or not writable; likewise.
    """
    if hub_id(name) is None and not is_pytorch(name):
        return name
    wanted = None if dtype is None or (given := np.dtype(dtype).name) not in DTYPES else given
    try:
        location = locate(name)
    except UserError:
        if kept := _find_by_name(name, wanted):
            return kept
        raise
    if location.converted:
        return fetch_all(location)
    key = location.commit or _fingerprint(location.folder)
    if kept := _find(key, wanted):
        return kept
    if jax.process_count() > 1:
        raise UserError(
            f"{location.name} must be converted before {jax.process_count()} processes can load it: pdrop convert "
            f"{location.name} OUT"
        )
    with _lock(key, f"{location.name}: waiting for another process that is converting it"):
        return _find(key, wanted) or _convert(location, key, wanted)


def entries() -> list[tuple[Entry, pathlib.Path]]:
    """All converted models with their folders, the last used first. Removes what killed conversions have left."""
    _sweep()
    found = [(entry, folder) for folder in root().glob("*-*") if (entry := _read(folder))]
    return sorted(found, key=lambda pair: -last_use(pair[1]))


def last_use(folder: pathlib.Path) -> float:
    """Time at which the entry in ``folder`` was made or used, in seconds of the epoch."""
    return (folder / ENTRY).stat().st_mtime


def size(folder: pathlib.Path) -> int:
    """Bytes of an entry."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove(folder: pathlib.Path) -> None:
    """Removes an entry. UserError if another process is converting the same checkpoint."""
    entry = _read(folder)
    try:
        with _lock(entry.key if entry else folder.name, None):
            (folder / ENTRY).unlink(missing_ok=True)  # first: the rest is not taken for a model if this is killed
            shutil.rmtree(folder)
    except filelock.Timeout:
        raise UserError(f"{folder} is being written by another process: try again when it has finished") from None


def is_pytorch(name: str | os.PathLike) -> bool:
    """Whether it is a folder whose config.json is that of a PyTorch checkpoint."""
    path = pathlib.Path(name) / "config.json"
    with contextlib.suppress(UserError):  # loading it will say what is wrong
        return "://" not in os.fspath(name) and path.is_file() and "model_type" in read_json(path)
    return False


def _convert(location: Location, key: str, wanted: str | None) -> pathlib.Path:
    """Called with the lock of ``key``."""
    source = open_source(location)
    default = default_dtype(source)
    dtype: DType = wanted or default  # type: ignore[assignment]
    name = (location.repo or location.folder.resolve().name).rpartition("/")[2]
    revision = location.revision if location.repo else None
    entry = Entry(location.repo or str(location.folder.resolve()), revision, key, dtype, dtype == default, name)
    folder = _folder_of(entry)
    if not (folder / ENTRY).exists():
        shown = printable(f"{location.name}: converting to {dtype} for this and later uses, into {folder / name}")
        print(f"{shown} (pdrop cache clear removes it)", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            write(source, folder / name, dtype=dtype)
            write_file(folder / ENTRY, json.dumps(dataclasses.asdict(entry), indent=2) + "\n")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder / name


def _folder_of(entry: Entry) -> pathlib.Path:
    return root() / f"{_short(entry.key)}-{entry.dtype}"


def _short(key: str) -> str:
    return key[:16]


def _find(key: str, wanted: str | None) -> pathlib.Path | None:
    """The model of this key and dtype."""
    return _use([(entry, folder) for entry, folder in entries() if entry.key == key], wanted)


def _find_by_name(name: str | os.PathLike, wanted: str | None) -> pathlib.Path | None:
    """The model that was last used of those that were asked for by this id, for when the Hub cannot be asked."""
    repo, revision = hub_id(name) or ("", None)
    found = [
        (entry, folder)
        for entry, folder in entries()
        if entry.source == repo and revision in (entry.revision, entry.key)
    ]
    return _use(found, wanted)


def _use(found: list[tuple[Entry, pathlib.Path]], wanted: str | None) -> pathlib.Path | None:
    for entry, folder in found:
        if entry.default if wanted is None else entry.dtype == wanted:
            with contextlib.suppress(OSError):  # a cache that others share may be read-only
                os.utime(folder / ENTRY)
            return folder / entry.name
    return None


def _read(folder: pathlib.Path) -> Entry | None:
    """The entry in ``folder``; None if it is not complete."""
    with contextlib.suppress(UserError):
        entry = validated(Entry, read_json(folder / ENTRY), str(folder / ENTRY))
        return entry if (folder / entry.name / "config.json").is_file() else None
    return None


@contextlib.contextmanager
def _lock(key: str, waiting: str | None) -> Iterator[None]:
    """Holds the lock of ``key``. Prints ``waiting`` if another process has it; raises Timeout if that is None."""
    path = root() / "locks" / _short(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if waiting is None:
            raise
        print(printable(waiting), file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sweep() -> None:
    """Removes what killed conversions have left."""
    for folder in root().glob("*-*"):
        if _read(folder) is None:
            # A process that is still converting has the lock; a shared cache may be read-only.
            with contextlib.suppress(filelock.Timeout, OSError), _lock(folder.name.rpartition("-")[0], None):
                shutil.rmtree(folder)


def _fingerprint(folder: pathlib.Path) -> str:
    """A hash that changes when a checkpoint's files do; 64 KiB at each end of a file are read."""
    digest = hashlib.blake2b(digest_size=20)
    tower = find_tower(folder, read_json(folder / "config.json").get("mm_vision_tower"))
    for place in (folder, *([tower.folder] if tower else [])):
        digest.update(os.fsencode(place.resolve()))
        for path in sorted(path for path in place.iterdir() if path.is_file()):
            found = path.stat()
            digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}".encode(errors="surrogateescape"))
            with path.open("rb") as file:
                digest.update(file.read(EDGE_BYTES))
                file.seek(max(found.st_size - EDGE_BYTES, 0))
                digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()
