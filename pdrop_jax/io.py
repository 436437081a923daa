"""Files on the local disk: their kind and size are checked before they are read; what is written is renamed when whole.

A FIFO or a device in place of a file would be waited for without end, so everything that is opened by name passes
``check_file`` first.
"""

import contextlib
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import Any

from pdrop_jax.errors import UserError

JSON_BYTES = 2**30  # of a JSON document that is read as a whole
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


@contextlib.contextmanager
def written_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a name beside ``path`` with its suffix; the file written there takes its place if nothing was raised."""
    new = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


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
