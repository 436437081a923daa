"""Files, local or in a bucket: checked for kind and size before they are read, written whole or not at all.

Local files are written under another name and renamed; writing an object of a bucket is atomic. Reading a FIFO or a
device in place of a file could block forever, so every file that is opened by name goes through ``check_file`` first.
"""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from pdrop_jax.errors import UserError
from pdrop_jax.paths import BucketPath, as_path, in_bucket, probe, why_missing

JSON_BYTES = 2**30  # largest JSON document
ASIDE = ".pdrop-unfinished-"  # prefix of files that are being written
UNFINISHED = ".pdrop-unfinished"  # object in a folder of a bucket that is being written
OLD = 24 * 60 * 60  # seconds after which such a file is abandoned
AnyPath = TypeVar("AnyPath", bound=pathlib.PurePath)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_file(path: str | os.PathLike, limit: int | None = None) -> int:
    """The size of a regular file, in bytes.

    Args:
      limit: largest allowed size, in bytes.

    Raises:
      UserError: the file does not exist, is a folder, a FIFO or a device, cannot be read, or is too large.
    """
    path = as_path(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} cannot be read: {why_missing(path, 'there is no such file')}") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is {_kind(found.st_mode)}, expected a file")
    if limit is not None and found.st_size > limit:
        raise UserError(f"{path} has {found.st_size:,} bytes, expected at most {limit:,}")
    return found.st_size


def read_bytes(path: str | os.PathLike, limit: int | None = None) -> bytes:
    """The contents of a regular file; raises UserError as ``check_file`` does."""
    check_file(path, limit)
    try:
        return as_path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None


def parse_json(content: str | bytes, where: str) -> Any:
    """The value of a JSON document.

    Args:
      where: how the error message refers to it, such as "answers.jsonl line 3".

    Raises:
      UserError: it is not JSON, is nested too deeply, a number has too many digits, or a string is not valid text.
    """
    try:
        value = json.loads(content)
        if _SURROGATE.search(content if isinstance(content, bytes) else content.encode()):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON but not text
    except RecursionError:
        raise UserError(f"{where} is malformed: it is nested too deeply") from None
    except ValueError as error:  # also its subclasses for malformed JSON and for bytes that are not UTF-8
        reason = "a number has too many digits" if "integer string conversion" in str(error) else error
        raise UserError(f"{where} is malformed: {reason}") from None
    return value


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The JSON value in a file of at most ``JSON_BYTES``.

    Args:
      kind: the required type; a JSON object by default.

    Raises:
      UserError: see ``check_file`` and ``parse_json``; or the value has another type.
    """
    value = parse_json(read_bytes(path, JSON_BYTES), str(path))
    if not isinstance(value, kind):
        raise UserError(
            f"{path} is malformed: it holds a {type(value).__name__}, expected a {_JSON_NAMES.get(kind, kind.__name__)}"
        )
    return value


def inside(folder: str | os.PathLike, name: str) -> bool:
    """Whether ``name``, joined to ``folder``, is a name below it: not ``../1.png``, ``/etc/passwd`` or ``a/../1.png``.

    Decided by the names alone: a link in the folder may lead elsewhere.
    """
    path = os.path.abspath(os.path.join(folder, name))
    return os.pardir not in pathlib.PurePath(name).parts and path.startswith(os.path.abspath(folder).rstrip("/") + "/")


@contextlib.contextmanager
def local_copy(folder: pathlib.Path, patterns: Sequence[str], limit: int | None = JSON_BYTES) -> Iterator[pathlib.Path]:
    """A local folder with the files of ``folder`` that match, for libraries that read local files only.

    It is ``folder`` itself unless that is in a bucket.

    Args:
      limit: largest allowed size of a file that is copied, in bytes.

    Raises:
      UserError: a file cannot be copied.
    """
    if not in_bucket(folder):
        yield folder
        return
    found = [path for path in folder.iterdir() if any(map(path.match, patterns))] if folder.is_dir() else []
    with tempfile.TemporaryDirectory(prefix="pdrop-") as name, ThreadPoolExecutor() as pool:
        copy = pathlib.Path(name)

        def fetch(path: pathlib.Path) -> None:
            check_file(path, limit)
            cast(BucketPath, path).download(copy / path.name)

        list(pool.map(fetch, found))
        try:
            yield copy
        except UserError as error:  # the user knows nothing of the copy
            raise UserError(*(str(line).replace(name, str(folder)) for line in error.args)) from None


def check_output(
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike] = (),
    endings: Sequence[str] = (),
    makes_folder: bool = False,
) -> pathlib.Path:
    """The file that a command is going to write, with links resolved. Called before any work, and again when writing.

    Args:
      overwrite: whether an existing file may be replaced.
      inputs: what the command reads. These files, and files inside these folders, are never replaced.
      endings: allowed endings of the name; empty allows any.
      makes_folder: whether a missing folder will be created.

    Raises:
      UserError: the ending is not allowed, the folder does not exist, or ``path`` is a folder, FIFO, socket, device, an
        input or an existing file.
    """
    path = as_path(path)
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{path}: the name ends in {path.suffix!r}, expected {', '.join(endings)}")
    if in_bucket(path):
        probe(path.parent)
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected the name of a file to write")
        if path.exists():
            _check_replaced(path, overwrite, any(_is_in(path, other) for other in inputs))
        return path
    try:
        target = pathlib.Path(os.path.realpath(path))
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"{path} cannot be written: {_reason(error)}") from None
    if found is None:
        if not (makes_folder or target.parent.is_dir()):
            raise UserError(f"{path}: there is no folder {target.parent if path.is_symlink() else path.parent}")
    else:
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is {_kind(found.st_mode)}, expected the name of a file to write")
        _check_replaced(path, overwrite, any(_holds(other, target, found) for other in inputs))
    if target.parent.is_dir() and not os.access(target.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: the folder {target.parent} is read-only")
    return target


def _check_replaced(path: pathlib.Path, overwrite: bool, is_input: bool) -> None:
    if is_input:
        raise UserError(f"{path} is read by this command: write to another file")
    if not overwrite:
        raise UserError(f"{path} exists: choose another name, or replace the file with --overwrite")


def check_outputs(outputs: Iterable[tuple[str | os.PathLike | None, Sequence[str]]], **rules: Any) -> None:
    """``check_output`` for each path that is not None, with its endings; also that no two are the same file."""
    targets = [check_output(path, endings=endings, **rules) for path, endings in outputs if path is not None]
    twice = next((target for n, target in enumerate(targets) if target in targets[:n]), None)
    if twice is not None:
        raise UserError(f"{twice} is used for two outputs: choose a different file for each")


def check_new_folder(path: str | os.PathLike) -> None:
    """Raises UserError if ``path`` exists, cannot be created because a parent is not a folder, or must not be written.

    In a bucket, a folder that holds ``UNFINISHED`` does not count: it was left by a killed process.
    """
    path = as_path(path)
    if in_bucket(path):
        probe(path.parent)
        if path.exists() and not (path / UNFINISHED).exists():
            raise UserError(f"{path} exists: remove it or choose another folder")
        return
    if os.path.lexists(path):
        raise UserError(f"{path} exists: remove it or choose another folder")
    place = next(parent for parent in pathlib.Path(path).absolute().parents if os.path.lexists(parent))
    if not place.is_dir():
        raise UserError(f"{path} cannot be created: {place} is not a folder")


def write_file(path: str | os.PathLike, content: str | bytes, overwrite: bool = False) -> None:
    """Writes a whole file, or nothing: on a full disk the old file is kept.

    Raises:
      UserError: see ``check_output`` and ``put_in_place``.
      OSError: the disk is full or not writable.
    """
    with written_aside(path, overwrite) as new:
        try:
            new.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def written_aside(path: str | os.PathLike, overwrite: bool = True) -> Iterator[pathlib.Path]:
    """Yields a temporary local name; the file written there replaces ``path`` unless an error is raised.

    Raises:
      UserError: see ``check_output`` and ``put_in_place``.
    """
    target = check_output(path, overwrite=overwrite)
    with aside(target) as new:
        yield new
        put_in_place(new, target, overwrite)


@contextlib.contextmanager
def aside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary local name for what is going to be ``target``, beside it unless that is in a bucket."""
    with contextlib.ExitStack() as at_end:
        if in_bucket(target):
            folder = pathlib.Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="pdrop-")))
        else:
            folder = target.parent
            _remove_old(folder)
        new = folder / f"{ASIDE}{secrets.token_hex(8)}{target.suffix}"
        at_end.callback(new.unlink, missing_ok=True)
        yield new


def put_in_place(new: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    """Moves the finished local file ``new`` to ``target``.

    Raises:
      UserError: ``target`` has appeared since it was checked. The file is then kept under the name in the message.
    """
    if isinstance(target, BucketPath):
        try:
            target.upload(new, new=not overwrite)
        except FileExistsError:
            other = _spare(target)
            other.upload(new)
            raise UserError(_APPEARED.format(target, other)) from None
        new.unlink()
        return
    if overwrite:
        if check_output(target, overwrite=True).exists():
            shutil.copymode(target, new)
        new.replace(target)
        return
    try:
        os.link(new, target)  # unlike a rename, this fails if the file exists
        new.unlink()
    except FileExistsError:
        spare = _spare(target)
        new.rename(spare)
        raise UserError(_APPEARED.format(target, spare)) from None
    except OSError:  # a file system without hard links
        check_output(target)
        new.rename(target)


_APPEARED = "{} was created by another program in the meantime: the output is in {}"


def _spare(target: AnyPath) -> AnyPath:
    return target.with_name(f"{target.stem}.{secrets.token_hex(4)}{target.suffix}")


def _is_in(path: pathlib.Path, other: str | os.PathLike) -> bool:
    """Whether ``path`` in a bucket is ``other`` or is inside it."""
    return in_bucket(other) and path.is_relative_to(as_path(other))


def _holds(other: str | os.PathLike, target: pathlib.Path, found: os.stat_result) -> bool:
    """Whether the file ``target`` is ``other`` or is inside it."""
    try:
        there = os.stat(other)
    except (OSError, ValueError):
        return False
    if stat.S_ISDIR(there.st_mode):
        return target.is_relative_to(os.path.realpath(other))
    return os.path.samestat(there, found)


def _remove_old(folder: pathlib.Path) -> None:
    """Removes files of writers that were killed more than a day ago."""
    for path in folder.glob(f"{ASIDE}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > OLD:
                path.unlink()


_JSON_NAMES: dict[type, str] = {dict: "JSON object", list: "JSON list"}


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "not a regular file")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
