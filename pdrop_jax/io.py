"""Files on the local disk: their kind and size are checked before they are read; what is written is renamed when whole.

A FIFO or a device in place of a file would be waited for without end, so everything that is opened by name passes
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

JSON_BYTES = 2**30  # of a JSON document that is read as a whole
ASIDE = ".pdrop-unfinished-"  # how names of files begin that are being written
OLD = 24 * 60 * 60  # seconds after which nobody writes such a file any more
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_file(path: str | os.PathLike, limit: int | None = None) -> int:
    """The size of a regular file, in bytes.

    Args:
      limit: the most bytes that it may have.

    Raises:
      UserError: there is no such file, it is a folder, a FIFO or a device, it cannot be read, or it is larger.
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
      where: what the error message calls it, such as "answers.jsonl line 3".

    Raises:
      UserError: it is not JSON, it is nested too deeply, a number has too many digits, or a string is no valid text.
    """
    try:
        value = json.loads(content)
        if _SURROGATE.search(content if isinstance(content, bytes) else content.encode()):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON but no text
    except RecursionError:
        raise UserError(f"{where} is malformed: it is nested too deeply") from None
    except ValueError as error:  # its subclasses are those of malformed JSON and of bytes that are not UTF-8
        reason = "a number has too many digits" if "integer string conversion" in str(error) else error
        raise UserError(f"{where} is malformed: {reason}") from None
    return value


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The JSON value in a file of at most ``JSON_BYTES``.

    Args:
      kind: the type it must have; a JSON object unless told otherwise.

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

    By the names alone, without a look at the disk: a link in the folder may lead elsewhere.
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
    """The file that a command is going to write, links followed. Called before any work, and again by the writing.

    Args:
      overwrite: whether a file that is there may be replaced.
      inputs: what the same command reads. No file of these is ever replaced, and none inside a folder of these.
      endings: what the name may end in; any if empty.
      makes_folder: whether the folder is made if it is not there.

    Raises:
      UserError: another ending, no such folder, a folder, FIFO, socket or device, an input, or a file that is there.
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
    """``check_output`` of each path that is not None, with its endings, and that no two are the same file."""
    targets = [check_output(path, endings=endings, **rules) for path, endings in outputs if path is not None]
    twice = next((target for n, target in enumerate(targets) if target in targets[:n]), None)
    if twice is not None:
        raise UserError(f"{twice} is named as two outputs: give each a file of its own")


def check_new_folder(path: str | os.PathLike) -> None:
    """Raises UserError if something stands at ``path``, or it would lie in what is no folder."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists: remove it or choose another folder")
    place = next(parent for parent in pathlib.Path(path).absolute().parents if os.path.lexists(parent))
    if not place.is_dir():
        raise UserError(f"{path} cannot be made: {place} is no folder")


def write_file(path: str | os.PathLike, content: str | bytes, overwrite: bool = False) -> None:
    """Writes a whole file, or nothing: a full disk leaves what was there.

    Raises:
      UserError: see ``check_output`` and ``put_in_place``.
      OSError: the disk is full or may not be written.
    """
    with written_aside(path, overwrite) as new:
        try:
            new.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def written_aside(path: str | os.PathLike, overwrite: bool = True) -> Iterator[pathlib.Path]:
    """Yields a name of its own beside ``path``; the file written there takes its place if nothing was raised.

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
      UserError: ``target`` has appeared since it was checked. The file then keeps a name that the message says.
    """
    if overwrite:
        if check_output(target, overwrite=True).exists():
            shutil.copymode(target, new)
        new.replace(target)
        return
    try:
        os.link(new, target)  # unlike a rename it fails if there is a file
        new.unlink()
    except FileExistsError:
        spare = target.with_name(f"{target.stem}.{secrets.token_hex(4)}{target.suffix}")
        new.rename(spare)
        raise UserError(f"{target} was made by another program meanwhile: what belongs there is in {spare}") from None
    except OSError:  # a file system without hard links
        check_output(target)
        new.rename(target)


def _holds(other: str | os.PathLike, target: pathlib.Path, found: os.stat_result) -> bool:
    """Whether the file ``target`` is ``other`` or lies in it."""
    try:
        there = os.stat(other)
    except (OSError, ValueError):
        return False
    if stat.S_ISDIR(there.st_mode):
        return target.is_relative_to(os.path.realpath(other))
    return os.path.samestat(there, found)


def _remove_old(folder: pathlib.Path) -> None:
    """Removes what writers left that were killed more than a day ago."""
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
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "no regular file")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
