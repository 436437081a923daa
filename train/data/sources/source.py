"""Source: records in order, and their pictures at random.

Conversations are tokenized once, so they are read once and in order. Pictures are needed again and again, in any order
and in several processes. So a record names its pictures by strings that any copy of the source can read: a *reference*
is the name of a file in the folder of images, a ``data:`` URL, or a place in one of the source's files.
"""

import abc
import base64
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.encoded import decode_data_url, is_data_url
from pdrop_jax.inputs.images import image_size
from pdrop_jax.io import inside
from pdrop_jax.paths import is_dir, names_in
from pdrop_jax.train.data.invalid import BAD_ENTRY, NO_FILE, OUTSIDE, InvalidRecord

PICTURE_BYTES = 2**28  # largest file of a picture
RECORD_BYTES = 2**24  # largest JSON text of a record
SEPARATOR = "\0"  # between references in a list of them; no file name has it
_PLACE = "at:"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Place(str):
    """A reference to a picture inside a file of the source. Only sources make them; no record can contain one."""

    @classmethod
    def of(cls, *numbers: int) -> "Place":
        return cls(_PLACE + ":".join(map(str, numbers)))


def numbers_of(reference: str) -> list[int]:
    """The numbers of a ``Place``."""
    return [int(number) for number in reference[len(_PLACE) :].split(":")]


class Source(abc.ABC):
    """A data set in one of the formats.

    Attributes:
      path: as the user gave it, for messages.
      files: the files of the records, in order.
      images: folder that the names of pictures are relative to.
    """

    def __init__(self, path: str, files: list[str], images: str) -> None:
        self.path, self.files, self.images = path, files, images
        self.make_caches()

    def make_caches(self) -> None:  # noqa: B027, most formats keep nothing
        """Sets what a source keeps to read faster, here and in a pickled copy, which does not get it."""

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "files": self.files, "images": self.images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.make_caches()

    @abc.abstractmethod
    def records(self) -> Iterator[Any]:
        """Yields each record in order: a JSON object in one of the two forms that ``examples.read_record`` takes.

        Where a picture belongs, an object may have its name, a ``data:`` URL, a ``Place``, or a mapping with the keys
        "bytes" and "path". What is not JSON comes as None, or as an ``InvalidRecord`` that says more.

        Raises:
          UserError: a file cannot be read, is damaged or cut short.
        """

    def read(self, reference: str) -> str | bytes:
        """The path of a picture's file, or the bytes of one. Safe in threads, and in a pickled copy.

        Raises:
          UserError: the picture cannot be read.
        """
        if is_data_url(reference):
            return decode_data_url(reference, "the record")
        if reference.startswith(_PLACE):
            return self.extract(*numbers_of(reference))
        return os.path.join(self.images, reference)

    def size(self, reference: str) -> tuple[int, int]:
        """(height, width) in pixels of a picture, as ``images.image_size`` gives it."""
        return image_size(self.read(reference))

    def extract(self, *place: int) -> str | bytes:
        """The picture at a ``Place`` of these numbers; see ``read``."""
        raise NotImplementedError(f"{type(self).__name__} has no places")


def reference_finder(images: str, outside: bool = False) -> Callable[[Any], str]:
    """Returns a function that turns what a record says of a picture into a reference, or raises InvalidRecord.

    Args:
      outside: see ``file_finder``.
    """
    is_file = file_finder(images, outside)

    def find(entry: Any) -> str:
        if isinstance(entry, Mapping):  # Hugging Face's Image
            entry = entry.get("path") if entry.get("bytes") is None else entry["bytes"]
        if isinstance(entry, bytes):
            return f"data:;base64,{base64.b64encode(entry).decode()}"
        if not isinstance(entry, str):
            raise InvalidRecord(BAD_ENTRY, f"a {type(entry).__name__}")
        if SEPARATOR in entry or _SURROGATE.search(entry):
            raise InvalidRecord(BAD_ENTRY, "its name is not valid text")
        if isinstance(entry, Place) or is_data_url(entry):
            return entry
        if not is_file(entry):
            raise InvalidRecord(NO_FILE, entry)
        return f"./{entry}" if entry.startswith(_PLACE) else entry

    return find


def file_finder(folder: str, outside: bool = False) -> Callable[[str], bool]:
    """Returns a function that checks whether a file with a given name exists below ``folder``.

    The function lists each directory only once. Checking every file separately takes minutes on network file systems.

    Args:
      outside: whether a name may leave ``folder``, such as ``../1.png`` or ``/etc/1.png``. Otherwise the function
        raises InvalidRecord for such names. Only names are checked: a symbolic link in ``folder`` may point anywhere.
    """

    names = functools.cache(names_in)

    def is_file(name: str) -> bool:
        if not outside and name and not inside(folder, name):
            raise InvalidRecord(OUTSIDE, name)
        parent, own = os.path.split(os.path.join(folder, name))
        return own in names(parent)

    return is_file


def check_images_folder(path: str) -> None:
    """Raises UserError if ``path`` is not a folder."""
    if not is_dir(path):
        raise UserError(f"data.images is {path}, which is not a folder: set it to the folder of the images")
