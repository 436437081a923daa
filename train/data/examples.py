"""Convert a record of LLaVA's JSON format to a training example, or reject it with a reason."""

import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from pdrop_jax.batch import IGNORE
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageSize
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.messages import read_turns
from pdrop_jax.inputs.prompts import PromptTemplate
from pdrop_jax.inputs.targets import Example, TrainingText, turns_of
from pdrop_jax.io import check_file

# Reasons for skipping a record. Users see how often each one occurs.
MALFORMED = "malformed JSON"  # also if it is not an object, has no conversations, or has wrong roles
NOT_FOR_TEMPLATE = "not for this template"  # "plain" supports one image with its caption only
NO_FILE = "no image file"
OUTSIDE = "image outside of data.images"  # unless data.outside_images allows it
CORRUPT = "corrupt image"  # usually detected when it is loaded; also if it has too many pixels or is too narrow
NO_PICTURE = "<image> tag without image"
NO_TAG = "image without <image> tag"
NO_TARGET = "no target"
TOO_LONG = "too long"


class InvalidRecord(Exception):
    """A record that cannot be used. The only argument is one of the reasons above."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


def read_records(path: pathlib.Path) -> Iterator[Any]:
    """Yields the records of a JSON list or a JSON Lines file, and None for lines that are not JSON.

    Empty lines are ignored.

    Raises:
      UserError: the file does not exist, is not a regular file, is empty, or starts like a JSON list but is not one.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            lines = (line.strip() for line in file)
            first = next((line for line in lines if line), b"")
            if not first:
                raise UserError(f"{path} is empty: expected a JSON list of conversations, or one JSON object per line")
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
        raise UserError(f"{path} starts like a JSON list but is malformed: {error}") from None


def _read_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_example(
    record: Any, prompts: PromptTemplate, is_file: Callable[[str], bool]
) -> tuple[TrainingText, list[str]]:
    """Reads the text of a record and the names of its images, one for each ``<image>`` tag.

    Args:
      record: ``{"image": name or list of names, "conversations": […]}``, where "image" is optional. Other keys are
        ignored.
      prompts: the template that renders conversations.
      is_file: returns whether an image with that name exists; may raise InvalidRecord.

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
    except (UserError, TypeError, UnicodeEncodeError):  # lone surrogates are valid JSON but cannot be encoded
        raise InvalidRecord(MALFORMED) from None
    messages = read_turns(turns)
    tags = sum(len(message.media) for message in messages)
    if tags != len(pictures):
        raise InvalidRecord(NO_PICTURE if tags > len(pictures) else NO_TAG)
    try:
        conversation = prompts.training_text(messages)
    except UserError:
        raise InvalidRecord(NOT_FOR_TEMPLATE) from None
    if not conversation.spans:
        raise InvalidRecord(NO_TARGET)
    if not all(map(is_file, pictures)):
        raise InvalidRecord(NO_FILE)
    return conversation, pictures


def fit(
    example: Example, max_length: int, images: Sequence[ImageSize], too_long: Literal["truncate", "skip"]
) -> tuple[Example, int]:
    """Truncates ``example`` to ``max_length`` positions, which its ``images`` share.

    LLaVA's code may truncate in the middle of an image. Here the whole image is removed in that case. No target is
    affected, because nothing follows a truncated image.

    Returns:
      The example, and how many of its images are left.

    Raises:
      InvalidRecord: the example is too long and ``too_long`` is "skip", or no target is left.
    """
    slots, places = np.ones(len(example.ids), int), np.flatnonzero(example.ids == IMAGE_PLACEHOLDER)
    parts = np.array([image.parts for image in images], int)
    slots[places] = np.repeat([image.tokens for image in images] // np.maximum(parts, 1), parts)
    n = int(np.searchsorted(np.cumsum(slots), max_length, side="right"))
    left = len(images)
    if n < len(slots):
        if too_long == "skip":
            raise InvalidRecord(TOO_LONG)
        ends = np.cumsum(parts)
        left = int(np.searchsorted(ends, np.searchsorted(places, n), side="right"))
        if left < len(images):
            n = min(n, int(places[ends[left] - parts[left]]))  # the first part of the first image that does not fit
        example = Example(example.ids[:n], example.labels[:n])
    if not (example.labels[1:] != IGNORE).any():  # no earlier token can predict the first one
        raise InvalidRecord(NO_TARGET)
    return example, left
