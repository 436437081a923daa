"""A record of LLaVA's JSON -> a training row, or why it is invalid."""

import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from pdrop_jax.batch import IGNORE
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER, IMAGE_TAG
from pdrop_jax.inputs.targets import Example, TrainingText, training_text, turns_of
from pdrop_jax.io import check_file

# Why a record is left out: what users see counted.
MALFORMED = "malformed JSON"  # also: no object, no conversations, wrong roles
NOT_FOR_TEMPLATE = "not for this template"  # "plain" takes a picture and its caption, nothing else
NO_FILE = "no image file"
OUTSIDE = "picture outside of data.images"  # refused unless data.outside_images allows it
CORRUPT = "corrupt picture"  # mostly found only when it is loaded; also one of too many pixels, or too narrow
NO_PICTURE = "<image> without picture"
NO_TAG = "picture without <image>"
NO_TARGET = "no target"
TOO_LONG = "too long"


class InvalidRecord(Exception):
    """The reason, one of the above, is its only argument."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


def read_records(path: pathlib.Path) -> Iterator[Any]:
    """The records of a JSON list or of JSON lines; None for a line that is no JSON. Empty lines are nothing.

    Raises:
      UserError: there is no such file, it is no file, it is empty, or a list that is no JSON as a whole.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            lines = (line.strip() for line in file)
            first = next((line for line in lines if line), b"")
            if not first:
                raise UserError(f"{path} is empty: expected a JSON list of conversations, or one JSON object a line")
            if not first.startswith((b"[", b"\xef\xbb\xbf[")):
                yield from (_read_line(line) for line in itertools.chain([first], lines) if line)
                return
            file.seek(0)
            yield from json.load(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} begins like a JSON list but is none: {error}") from None


def _read_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_example(record: Any, template: str, is_file: Callable[[str], bool]) -> tuple[TrainingText, list[str]]:
    """The text of a record and the names of its pictures, one for each tag.

    Args:
      record: ``{"image": a name, several or nothing, "conversations": […]}``; whatever else it holds is not looked at.
      is_file: whether there is a picture of that name; it may raise InvalidRecord.

    Raises:
      InvalidRecord: the record cannot be used.
    """
    if not isinstance(record, dict):
        raise InvalidRecord(MALFORMED)
    pictures = record.get("image")
    if not isinstance(pictures, list):
        pictures = [] if pictures is None else [pictures]
    try:
        turns = turns_of(record.get("conversations"), several=len(pictures) > 1)
        "".join([*pictures, *(text or "" for turn in turns for text in turn)]).encode()
    except (UserError, TypeError, UnicodeEncodeError):  # half a surrogate pair is valid JSON, but no text
        raise InvalidRecord(MALFORMED) from None
    tags = sum((question + (answer or "")).count(IMAGE_TAG) for question, answer in turns)
    if tags != len(pictures):
        raise InvalidRecord(NO_PICTURE if tags > len(pictures) else NO_TAG)
    try:
        conversation = training_text(turns, template)
    except UserError:
        raise InvalidRecord(NOT_FOR_TEMPLATE) from None
    if not conversation.spans:
        raise InvalidRecord(NO_TARGET)
    if not all(map(is_file, pictures)):
        raise InvalidRecord(NO_FILE)
    return conversation, pictures


def fit(
    example: Example, max_length: int, image_tokens: Sequence[int], too_long: Literal["truncate", "skip"]
) -> Example:
    """``example`` within ``max_length`` positions, each of its images counted in full with its ``image_tokens``.

    LLaVA's code cuts in the middle of an image too. Here all of the image goes then: nothing comes after it any more,
    so no target sees the difference.

    Raises:
      InvalidRecord: it is too long and ``too_long`` is "skip", or no target is left.
    """
    slots = np.ones(len(example.ids), int)
    slots[example.ids == IMAGE_PLACEHOLDER] = image_tokens
    n = int(np.searchsorted(np.cumsum(slots), max_length, side="right"))
    if n < len(slots):
        if too_long == "skip":
            raise InvalidRecord(TOO_LONG)
        example = Example(example.ids[:n], example.labels[:n])
    if not (example.labels[1:] != IGNORE).any():  # nothing stands before the first token that could predict it
        raise InvalidRecord(NO_TARGET)
    return example
