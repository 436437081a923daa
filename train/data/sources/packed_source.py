"""Shards of ``pdrop data pack``: ArrayRecord files, which grain reads at random.

A record is a msgpack array of two: the JSON text of a record with "messages", whose pictures have no source of their
own, and the list of their files' bytes, in order. The last record of a shard is its index, a msgpack array of the texts
again, each with the height and width of its pictures in pixels. So a run that starts reads no pictures.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgpack
from pydantic import Field, TypeAdapter

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.chat_template import IMAGE_TAG
from pdrop_jax.inputs.images import MAX_EDGE
from pdrop_jax.inputs.messages import Medium, Message
from pdrop_jax.io import parse_json
from pdrop_jax.train.data.sources.files import check_format, reading
from pdrop_jax.train.data.sources.source import Place, Source, numbers_of

OPEN_FILES = 64
ERRORS = (RuntimeError, ValueError, OSError, IndexError)  # of Riegeli, whose records have checksums


class PackedSource(Source):
    """ArrayRecord shards."""

    def __init__(self, path: str, files: list[str], images: str) -> None:
        super().__init__(path, files, images)
        import_grain()

    def make_caches(self) -> None:
        self._open = functools.lru_cache(OPEN_FILES)(self._open_file)

    def records(self) -> Iterator[Any]:
        for number, path in enumerate(self.files):
            check_format(path, "ArrayRecord")
            with reading(path, ERRORS, "pack"):
                shard = self._open(number)
                index = unpack_index(shard[len(shard) - 1], path)
                if len(index) != len(shard) - 1:
                    raise UserError(f"{path} has {len(shard) - 1} records, but {len(index)} in its index: pack again")
                for at, (record, sizes) in enumerate(index):
                    places = [Place.of(number, at, which, *size) for which, size in enumerate(sizes)]
                    yield record | {"images": places}

    def extract(self, *place: int) -> str | bytes:
        number, at, which, _, _ = place
        with reading(self.files[number], ERRORS, "pack"):
            return unpack_record(self._open(number)[at], f"{self.files[number]}, record {at}")[which]

    def size(self, reference: str) -> tuple[int, int]:
        height, width = numbers_of(reference)[-2:]
        return height, width

    def _open_file(self, number: int) -> Any:
        return import_grain().sources.ArrayRecordDataSource([self.files[number]])


def record_text(messages: Sequence[Message], identity: Any = None) -> str:
    """The JSON text of a record. ``messages`` come back as they are, with places for all of their media."""
    said = [{"role": message.role, "content": [_content(part) for part in message.parts] or ""} for message in messages]
    record: dict[str, Any] = {"id": identity} if isinstance(identity, str | int) else {}
    return json.dumps(record | {"messages": said}, ensure_ascii=False)


def _content(part: str | Medium) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "text", "text": IMAGE_TAG} if part.inline else {"type": "image"}


def pack_record(text: str, pictures: Sequence[bytes]) -> bytes:
    """A record of a shard: the text of a record, and the files of its pictures."""
    return msgpack.packb([text, list(pictures)])


def unpack_record(content: bytes, where: str) -> list[bytes]:
    """The pictures of a record. Raises UserError if it is none of ``pack_record``."""
    with contextlib.suppress(ValueError, TypeError, msgpack.UnpackException):
        _, pictures = msgpack.unpackb(content)
        if isinstance(pictures, list) and all(isinstance(picture, bytes) for picture in pictures):
            return pictures
    raise UserError(f"{where} is not a record of pdrop data pack: pack the data again")


Size = Annotated[int, Field(ge=1, le=MAX_EDGE)]
Index = tuple[tuple[str, tuple[tuple[Size, Size], ...]], ...]  # of each record: text, (height, width) of its pictures
_INDEX: TypeAdapter[Index] = TypeAdapter(Index)


def pack_index(index: Index) -> bytes:
    """The last record of a shard."""
    return msgpack.packb(index)


def unpack_index(content: bytes, where: str) -> list[tuple[dict[str, Any], tuple[tuple[int, int], ...]]]:
    """The records and the sizes of their pictures. Raises UserError if ``content`` is none of ``pack_index``."""
    try:
        index = _INDEX.validate_python(msgpack.unpackb(content, use_list=False), strict=True)
        found = [(parse_json(text, where), sizes) for text, sizes in index]
        if all(isinstance(record, dict) for record, _ in found):
            return found
    except (ValueError, TypeError, msgpack.UnpackException):  # also pydantic's and the UserError of parse_json
        pass
    raise UserError(f"{where} has no index of pdrop data pack: pack the data again")


def import_grain() -> Any:
    """The module grain, imported only when training reads data. Raises UserError if it is not installed."""
    try:
        import grain
    except ImportError:
        raise UserError("training needs grain, which is not installed: pip install 'pdrop-jax[train]'") from None
    return grain
