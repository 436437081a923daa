"""Shards of ``pdrop data pack``: ArrayRecord files, which grain reads at random.

A record is a msgpack array of two: the JSON text of a record with "messages", whose pictures have no source of their
own, and the list of their files' bytes, in order.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.chat_template import IMAGE_TAG
from pdrop_jax.inputs.messages import Medium, Message
from pdrop_jax.io import parse_json
from pdrop_jax.train.data.sources.files import check_format
from pdrop_jax.train.data.sources.source import Place, Source

OPEN_FILES = 64


class PackedSource(Source):
    """ArrayRecord shards."""

    def __init__(self, path: str, files: list[str], images: str) -> None:
        super().__init__(path, files, images)
        import_grain()
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "files": self.files, "images": self.images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = functools.lru_cache(OPEN_FILES)(self._open_file)

    def records(self) -> Iterator[Any]:
        for number, path in enumerate(self.files):
            check_format(path, "ArrayRecord")
            with _one_line_errors(path):
                for at in range(len(self._open(number))):
                    record, pictures = self._read(number, at)
                    yield record | {"images": [Place.of(number, at, which) for which in range(len(pictures))]}

    def extract(self, *place: int) -> str | bytes:
        number, at, which = place
        with _one_line_errors(self.files[number]):
            return self._read(number, at)[1][which]

    def _read(self, number: int, at: int) -> tuple[dict[str, Any], list[bytes]]:
        return unpack_record(self._open(number)[at], f"{self.files[number]}, record {at}")

    def _open_file(self, number: int) -> Any:
        return import_grain().sources.ArrayRecordDataSource([self.files[number]])


def pack_record(messages: Sequence[Message], pictures: Sequence[bytes], identity: Any = None) -> bytes:
    """A record of a shard. ``messages`` come back as they are, with one of ``pictures`` for each of their media."""
    said = [{"role": message.role, "content": [_content(part) for part in message.parts] or ""} for message in messages]
    record: dict[str, Any] = {"id": identity} if isinstance(identity, str | int) else {}
    record |= {"messages": said}
    return msgpack.packb([json.dumps(record, ensure_ascii=False), list(pictures)])


def _content(part: str | Medium) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "text", "text": IMAGE_TAG} if part.inline else {"type": "image"}


def unpack_record(content: bytes, where: str) -> tuple[dict[str, Any], list[bytes]]:
    """Inverse of ``pack_record``. Raises UserError if it is no record of a shard."""
    try:
        text, pictures = msgpack.unpackb(content)
        record = parse_json(text, where)
        if isinstance(record, dict) and isinstance(pictures, list) and all(isinstance(x, bytes) for x in pictures):
            return record, pictures
    except (ValueError, TypeError, msgpack.UnpackException):
        pass
    raise UserError(f"{where} is not a record of pdrop data pack: pack the data again")


def import_grain() -> Any:
    """The module grain, imported only when training reads data. Raises UserError if it is not installed."""
    try:
        import grain
    except ImportError:
        raise UserError("training needs grain, which is not installed: pip install 'pdrop-jax[train]'") from None
    return grain


@contextlib.contextmanager
def _one_line_errors(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError, IndexError) as error:  # Riegeli, whose records have checksums
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or was cut short ({reason}): pack or download it again") from None
