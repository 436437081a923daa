"""JSON lists and JSON Lines, with the pictures in a folder or as ``data:`` URLs."""

import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.paths import as_path
from pdrop_jax.train.data.sources.files import check_format, open_binary
from pdrop_jax.train.data.sources.source import Source


class JsonSource(Source):
    """Files of JSON lists or JSON Lines."""

    def records(self) -> Iterator[Any]:
        for path in self.files:
            check_format(path, "JSON")
            yield from read_records(as_path(path))


def read_records(path: pathlib.Path) -> Iterator[Any]:
    """Yields the records of a JSON list or a JSON Lines file, and None for lines that are not JSON.

    Empty lines are ignored.

    Raises:
      UserError: the file does not exist, is not a regular file, is empty, starts like a JSON list but is not one, or
        none of its lines is JSON.
    """
    file = open_binary(path)
    try:
        with file:
            lines = (line.strip() for line in file)
            first = next((line for line in lines if line), b"")
            if not first:
                raise UserError(f"{path} is empty: expected a JSON list of conversations, or one JSON object per line")
            if first.startswith((b"[", b"\xef\xbb\xbf[")):
                file.seek(0)
                yield from json.load(file)
            else:
                yield from _read_lines(path, itertools.chain([first], lines))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} starts like a JSON list but is malformed: {error}") from None


def _read_lines(path: pathlib.Path, lines: Iterator[bytes]) -> Iterator[Any]:
    malformed = 0  # lines before the first one that is JSON
    for line in lines:
        if not line:
            continue
        record = _read_line(line)
        if isinstance(record, dict) and malformed >= 0:
            yield from itertools.repeat(None, malformed)
            malformed = -1
        if malformed >= 0:
            malformed += 1
        else:
            yield record
    if malformed >= 0:
        raise UserError(
            f"{path} is neither a JSON list nor JSON Lines: none of its {malformed:,} lines is a JSON object of its own"
        )


def _read_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
