"""Convert a record to a training example, or reject it with a reason."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pdrop_jax.batch import IGNORE
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageSize
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.messages import Message, WrongCount, read_dialogue, read_turns
from pdrop_jax.inputs.prompts import PromptTemplate
from pdrop_jax.inputs.targets import Example, TrainingText, turns_of
from pdrop_jax.train.data.invalid import (
    CONVERSATION,
    MALFORMED,
    NO_CONVERSATION,
    NO_PICTURE,
    NO_TAG,
    NO_TARGET,
    NOT_FOR_TEMPLATE,
    TOO_LONG,
    VIDEO,
    InvalidRecord,
)


def read_record(record: Any, find: Callable[[Any], str]) -> tuple[list[Message], list[str]]:
    """Reads the messages of a record and the references of its images, one for each of their places.

    Args:
      record: an InvalidRecord, or an object in one of two forms, decided by its first message. Other keys are ignored.

        - LLaVA's: "conversations" holds ``{"from": "human" | "gpt", "value": text}``, and "image" or "images" a picture
          or a list of them, one for each ``<image>`` tag.
        - OpenAI's and transformers': "messages" (or "conversations") holds ``{"role", "content"}``, see
          ``messages.read_conversation``. Pictures of contents that hold none are those of "images" or "image".
      find: returns the reference of what stands for a picture in the record, see ``source.reference_finder``.

    Raises:
      InvalidRecord: the record cannot be used.
    """
    if isinstance(record, InvalidRecord):
        raise record
    if not isinstance(record, dict):
        raise InvalidRecord(MALFORMED)
    said = record.get("conversations")
    said = record.get("messages") if said is None else said
    if said is None:
        raise InvalidRecord(NO_CONVERSATION, f"its keys are {', '.join(map(str, record))}"[:200])
    given = record.get("image")
    given = record.get("images") if given is None else given
    pictures = given if isinstance(given, list) else [] if given is None else [given]
    try:
        if isinstance(said, list) and said and isinstance(said[0], Mapping) and "role" in said[0]:
            messages, pictures = read_dialogue(said, pictures)
        else:
            messages = read_turns(turns_of(said, several=len(pictures) > 1))
        "".join(part for message in messages for part in message.parts if isinstance(part, str)).encode()
    except WrongCount as error:
        raise InvalidRecord(NO_PICTURE if error.missing else NO_TAG, str(error)) from None
    except UnicodeEncodeError:  # lone surrogates are valid JSON but cannot be encoded
        raise InvalidRecord(CONVERSATION, "a text is not valid Unicode") from None
    except UserError as error:
        raise InvalidRecord(CONVERSATION, str(error)) from None
    media = [medium for message in messages for medium in message.media]
    if any(medium.kind == "video" for medium in media):
        raise InvalidRecord(VIDEO)
    if len(media) != len(pictures):
        raise InvalidRecord(
            NO_PICTURE if len(media) > len(pictures) else NO_TAG, f"{len(media)} tags, {len(pictures)} images"
        )
    return messages, [find(picture) for picture in pictures]


def read_example(record: Any, prompts: PromptTemplate, find: Callable[[Any], str]) -> tuple[TrainingText, list[str]]:
    """``read_record``, rendered by the template ``prompts``.

    Raises:
      InvalidRecord: the record cannot be used.
    """
    messages, pictures = read_record(record, find)
    try:
        conversation = prompts.training_text(messages)
    except UserError as error:
        raise InvalidRecord(NOT_FOR_TEMPLATE, str(error)) from None
    if not conversation.spans:
        raise InvalidRecord(NO_TARGET)
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
