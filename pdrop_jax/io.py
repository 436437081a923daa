"""Files on the local disk: checked for kind and size before they are read, written under another name and renamed.

Reading a FIFO or a device in place of a file could block forever, so every file that is opened by name goes through
``check_file`` first.
"""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pdrop_jax.errors import UserError

JSON_BYTES = 2**30  # largest JSON document
ASIDE = ".pdrop-unfinished-"  # prefix of files that are being written
OLD = 24 * 60 * 60  # seconds after which such a file is abandoned
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_file(path: str | os.PathLike, limit: int | None = None) -> int:
    """The size of a regular file, in bytes.

    Args:
      limit: largest allowed size, in bytes.

    Raises:
      UserError: the file does not exist, is a folder, a FIFO or a device, cannot be read, or is too large.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path} cannot be read: there is no such file") from None
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
        return pathlib.Path(path).read_bytes()
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
    path = pathlib.Path(path)
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{path}: the name ends in {path.suffix!r}, expected {', '.join(endings)}")
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
        if any(_holds(other, target, found) for other in inputs):
            raise UserError(f"{path} is read by this command: write to another file")
        if not overwrite:
            raise UserError(f"{path} exists: choose another name, or replace the file with --overwrite")
    if target.parent.is_dir() and not os.access(target.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: the folder {target.parent} is read-only")
    return target


def check_outputs(outputs: Iterable[tuple[str | os.PathLike | None, Sequence[str]]], **rules: Any) -> None:
    """``check_output`` for each path that is not None, with its endings; also that no two are the same file."""
    targets = [check_output(path, endings=endings, **rules) for path, endings in outputs if path is not None]
    twice = next((target for n, target in enumerate(targets) if target in targets[:n]), None)
    if twice is not None:
        raise UserError(f"{twice} is used for two outputs: choose a different file for each")


def check_new_folder(path: str | os.PathLike) -> None:
    """Raises UserError if ``path`` exists or cannot be created because a parent is not a folder."""
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
    """Yields a temporary name beside ``path``; the file written there replaces it unless an error is raised.

    Raises:
      UserError: see ``check_output`` and ``put_in_place``.
    """
    target = check_output(path, overwrite=overwrite)
    _remove_old(target.parent)
    new = target.with_name(f"{ASIDE}{secrets.token_hex(8)}{target.suffix}")
    try:
        yield new
        put_in_place(new, target, overwrite)
    finally:
        new.unlink(missing_ok=True)


def put_in_place(new: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    """Renames the finished file ``new``.

    Raises:
      UserError: ``target`` has appeared since it was checked. The file is then kept under the name in the message.
    """
    if overwrite:
        if check_output(target, overwrite=True).exists():
            shutil.copymode(target, new)
        new.replace(target)
        return
    try:
        os.link(new, target)  # unlike a rename, this fails if the file exists
        new.unlink()
    except FileExistsError:
        spare = target.with_name(f"{target.stem}.{secrets.token_hex(4)}{target.suffix}")
        new.rename(spare)
        raise UserError(f"{target} was created by another program in the meantime: the output is in {spare}") from None
    except OSError:  # a file system without hard links
        check_output(target)
        new.rename(target)


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
