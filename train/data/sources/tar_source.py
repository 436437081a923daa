"""WebDataset: tar files with KEY.json and KEY.jpg, or KEY.0.jpg, KEY.1.jpg, … in a row.

The webdataset library (1.0.2) was tried: it only streams. It shuffles within a buffer, so neither an epoch nor a resume
could be exact, and its reader at random, wids, is gone. Python's tarfile finds the members once; a picture is then read
by its offset. No member is ever extracted to a file.
"""

import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from pdrop_jax.errors import UserError
from pdrop_jax.io import parse_json
from pdrop_jax.train.data.invalid import MALFORMED, InvalidRecord
from pdrop_jax.train.data.sources.files import check_format, open_binary, reading
from pdrop_jax.train.data.sources.source import PICTURE_BYTES, RECORD_BYTES, Place, Source

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError)  # of tarfile, on a damaged file


class TarSource(Source):
    """Tar files of samples, each with a JSON record. The pictures of a record are those of its sample, in order."""

    def records(self) -> Iterator[Any]:
        for number, path in enumerate(self.files):
            check_format(path, "tar")
            with open_binary(path) as file:
                for key, members in itertools.groupby(_members(file, path), key=_key):
                    yield _record(key, list(members), file, number)

    def extract(self, *place: int) -> str | bytes:
        number, offset, size = place
        if size > PICTURE_BYTES:
            raise UserError(f"a picture of {size:,} bytes is too large: at most {PICTURE_BYTES:,} are read")
        with open_binary(self.files[number]) as file:
            file.seek(offset)
            return file.read(size)


def _members(file: BinaryIO, path: str) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar archive. Raises UserError if it is damaged or cut short."""
    size = file.seek(0, 2)
    file.seek(0)
    with reading(path, ERRORS), tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it keeps all of them
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"member {member.name!r} ends behind the end of the file")
            if member.isreg() and not member.issparse() and not posixpath.basename(member.name).startswith("."):
                yield member
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the mark at its end is missing")


def _key(member: tarfile.TarInfo) -> str:
    """WebDataset's: the name up to the first dot after the last slash."""
    folder, name = posixpath.split(member.name)
    return posixpath.join(folder, name.partition(".")[0])


def _record(key: str, members: list[tarfile.TarInfo], file: BinaryIO, number: int) -> Any:
    """The record of a sample with the places of its pictures, or an InvalidRecord."""
    texts = [member for member in members if member.name.lower().endswith(".json")]
    if len(texts) != 1 or texts[0].size > RECORD_BYTES:
        return InvalidRecord(
            MALFORMED, f"{key} has {len(texts)} .json" if len(texts) != 1 else f"{key}.json is too large"
        )
    file.seek(texts[0].offset_data)
    try:
        record = parse_json(file.read(texts[0].size), texts[0].name)
    except UserError as error:
        return InvalidRecord(MALFORMED, str(error))
    pictures = [Place.of(number, m.offset_data, m.size) for m in members if m.name.lower().endswith(PICTURES)]
    if not isinstance(record, dict) or not pictures:
        return record  # one without pictures in the archive may still name files
    kept = {key: value for key, value in record.items() if key not in ("image", "images")}
    return _without_names(kept) | {"images": pictures}


def _without_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose messages leave the place of each picture open instead of naming a file."""

    def opened(item: Any) -> Any:
        is_image = isinstance(item, dict) and item.get("type") in ("image", "image_url")
        return {"type": "image"} if is_image else item

    messages = record.get("messages")
    if not isinstance(messages, list):
        return record
    return record | {
        "messages": [
            message | {"content": list(map(opened, message["content"]))}
            if isinstance(message, dict) and isinstance(message.get("content"), list)
            else message
            for message in messages
        ]
    }
