"""Conversations: a plain question, (question, answer) turns, or messages in the form of OpenAI and Hugging Face.

All three become a list of ``Message`` and the images in the order in which they are shown, so that whatever renders a
conversation sees one form.
"""

import dataclasses
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.chat_template import IMAGE_TAG, Kind, Turn
from pdrop_jax.inputs.encoded import is_url, read_url
from pdrop_jax.inputs.frames import Standby
from pdrop_jax.inputs.images import Picture, Video, decode_image

Role = Literal["system", "user", "assistant"]
Opener = Callable[[Any, str], Any]  # makes a picture of what a content names, and of how errors refer to that content

CONTENT = ("text", "image", "image_url", "video")  # types of content
SOURCES = ("image", "url", "path", "base64")  # keys under which a content of type "image" may have its image
ROLES = ", ".join(get_args(Role))


class WrongCount(UserError):
    """The images of a conversation are more or fewer than the places for them.

    Attributes:
      missing: whether there are too few images.
    """

    def __init__(self, message: str, missing: bool) -> None:
        super().__init__(message)
        self.missing = missing


@dataclasses.dataclass(frozen=True)
class Medium:
    """The place of an image or a video in a message.

    Attributes:
      inline: whether it stands in the text, where an ``<image>`` tag was written.
    """

    kind: Kind = "image"
    inline: bool = False


@dataclasses.dataclass(frozen=True)
class Message:
    """A message; its ``parts`` are texts and media in order. Texts hold no ``<image>`` tags."""

    role: Role
    parts: tuple[str | Medium, ...]

    @property
    def media(self) -> list[Medium]:
        return [part for part in self.parts if isinstance(part, Medium)]

    @property
    def text(self) -> str:
        """The message with an ``<image>`` tag for each medium: before the text and on its own line, unless inline."""
        tags = f"{IMAGE_TAG}\n" * sum(not medium.inline for medium in self.media)
        inline = (part for part in self.parts if isinstance(part, str) or part.inline)
        return tags + "".join(part if isinstance(part, str) else IMAGE_TAG for part in inline)


Prompt = str | Sequence[Turn] | Sequence[Mapping[str, Any]] | Sequence[Message]


def read_conversation(prompt: Prompt, images: Sequence[Any] = ()) -> tuple[list[Message], list[Any]]:
    """The messages of ``prompt``, and one image for each of their media, in order.

    An image is an entry of ``images`` or inside a message. Those of ``images`` belong to the ``<image>`` tags and to
    the contents ``{"type": "image"}`` without an image of their own. If there are neither, all are put before the first
    question.

    Args:
      prompt: a question; a list of (question, answer) whose last answer may be None; or messages
        ``{"role": "system" | "user" | "assistant", "content": text or list}``. Items of a list are
        ``{"type": "text", "text": …}``, ``{"type": "image"}`` with the image under "image", "path", "url" or "base64"
        or without one, ``{"type": "image_url", "image_url": {"url": …}}`` and ``{"type": "video", "video": frames}``.
        A URL is a path, or a ``file://``, ``data:``, ``http://`` or ``https://`` URL. ``"mode": "standby"`` shows an
        image as ``frames.Standby``. The result of an earlier call is a prompt too, whose URLs are not read again.
      images: pictures, ``Video``s and ``Standby``s of these; None stands for one that is not known yet.

    Raises:
      UserError: the conversation is empty or has another form; a role or a type of content is unknown; roles do not
        alternate, the system message is not the first, or the last message is not from the user; an image cannot
        be read; or the numbers of images and of their places differ.
    """
    return _placed(_read_all(prompt, _image), list(images))


def read_dialogue(messages: Sequence[Mapping[str, Any]], images: Sequence[Any] = ()) -> tuple[list[Message], list[Any]]:
    """A recorded conversation, whose last message may be an answer: ``read_conversation`` without opening any image.

    Args:
      messages: see ``read_conversation``. An image inside may also be what a Parquet file holds, bytes or a mapping.
      images: anything but None; returned as they are.

    Returns:
      The messages, and what stands for each of their images: an entry of ``images``; a path or a ``data:`` URL; or
      the bytes or the mapping that a message holds.

    Raises:
      WrongCount: the numbers of images and of their places differ.
      UserError: as in ``read_conversation``.
    """
    read = [_read(message, f"message {number}", _unopened) for number, message in enumerate(messages, 1)]
    check_order([role for role, _ in read], answered=True)
    return _placed(read, list(images))


def read_turns(turns: Sequence[Turn]) -> list[Message]:
    """The messages of (question, answer) turns whose images are still to be read. Errors are those above."""
    read = _read_all(turns, _image)
    return _placed(read, [None] * sum(isinstance(part, Medium) for _, parts in read for part in parts))[0]


@dataclasses.dataclass(frozen=True)
class _Source:
    """A content with its own image, while it is read."""

    kind: Kind
    image: Any


_Raw = tuple[Role, list[str | Medium | _Source]]


def _read_all(prompt: Any, opener: Opener) -> list[_Raw]:
    if isinstance(prompt, str):
        return [("user", _split(prompt))]
    if isinstance(prompt, Mapping):
        raise UserError("a prompt is a question or a list of messages, got a single message: put it in a list")
    if not isinstance(prompt, Sequence):
        raise UserError(f"a prompt is a question or a list of messages, got a {type(prompt).__name__}")
    if not prompt:
        raise UserError("a conversation needs at least one question, got none")
    if all(isinstance(message, Message) for message in prompt):
        check_order([message.role for message in prompt])
        return [(message.role, list(message.parts)) for message in prompt]
    if any(isinstance(message, Mapping) for message in prompt):
        read = [_read(message, f"message {number}", opener) for number, message in enumerate(prompt, 1)]
        check_order([role for role, _ in read])
        return read
    read = []
    for number, turn in enumerate(prompt, 1):
        if not (isinstance(turn, Sequence) and len(turn) == 2 and not isinstance(turn, str)):
            raise UserError(
                f"entry {number} of a conversation is a {type(turn).__name__}: expected messages, "
                '{"role": …, "content": …}, or pairs of question and answer'
            )
        question, answer = turn
        if not isinstance(question, str) or not isinstance(answer, str | None):
            raise UserError(f"turn {number} is not a question and an answer, which are text")
        if answer is None and number < len(prompt):
            raise UserError(f"turn {number} of {len(prompt)} has no answer: only the last one may lack it")
        read.append(("user", _split(question)))
        if answer is not None:
            read.append(("assistant", _split(answer)))
    return read


def check_order(roles: Sequence[str], answered: bool = False) -> None:
    """Raises UserError unless ``roles`` are those of a conversation that waits for an answer.

    Args:
      answered: whether the last message may be the answer.
    """
    expected = "user"
    for number, role in enumerate(roles, 1):
        if role == "system":
            if number > 1:
                raise UserError(f"message {number} is a system message: only the first message may be one")
            continue
        if role != expected:
            raise UserError(
                f"message {number} is from {role!r}, expected {expected!r}: questions and answers alternate, and the "
                "user begins"
            )
        expected = "assistant" if role == "user" else "user"
    if not roles or roles[-1] != "user":
        if answered and "user" in roles:
            return
        raise UserError(
            f"the last message is from {roles[-1]!r}, expected 'user': end with the question to be answered"
            if roles
            else "a conversation needs at least one question, got none"
        )


def _read(message: Any, where: str, opener: Opener) -> _Raw:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} is a {type(message).__name__}: expected an object with role and content")
    role: Any = message.get("role")
    if role not in get_args(Role):
        raise UserError(f"{where} has role {role!r}: expected one of {ROLES}")
    content = message.get("content")
    if isinstance(content, str):
        return role, _split(content)
    if not isinstance(content, Sequence) or not content:
        found = "an empty list" if isinstance(content, Sequence) else type(content).__name__
        raise UserError(f"{where} has {found} as content: expected text, or a list of contents")
    parts: list[str | Medium | _Source] = []
    for number, item in enumerate(content, 1):
        parts += _read_item(item, f"content {number} of {where}", opener)
    return role, parts


def _read_item(item: Any, where: str, opener: Opener) -> list[str | Medium | _Source]:
    parts = _read_content(item, where, opener)
    mode = item.get("mode", "focus")
    if mode not in ("focus", "standby"):
        raise UserError(f"{where} has mode {mode!r}: expected 'focus' or 'standby'")
    if mode == "focus":
        return parts
    if not all(isinstance(part, _Source) for part in parts):
        raise UserError(f"{where} has mode 'standby' but no image of its own: give it one, or pass Standby(image)")
    return [dataclasses.replace(part, image=Standby(part.image)) for part in parts if isinstance(part, _Source)]


def _read_content(item: Any, where: str, opener: Opener) -> list[str | Medium | _Source]:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind not in CONTENT:
        found = f"type {kind!r}" if isinstance(item, Mapping) else f"the form of a {type(item).__name__}"
        raise UserError(f"{where} has {found}: expected an object whose type is one of {', '.join(CONTENT)}")
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise UserError(f"{where} has no text")
        return _split(item["text"])
    if kind == "video":
        video = item.get("video")
        if video is None:
            return [Medium("video")]
        if isinstance(video, str) or not isinstance(video, Video | Sequence):
            raise UserError(f"{where} is a video that is not given as its frames: expected a list of images")
        return [_Source("video", video if isinstance(video, Video) else Video([opener(x, where) for x in video]))]
    if kind == "image_url":
        url = item.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str):
            raise UserError(f'{where} has no URL: expected {{"type": "image_url", "image_url": {{"url": …}}}}')
        return [_Source("image", opener(url, where))]
    given = [key for key in SOURCES if item.get(key) is not None]
    if len(given) > 1:
        raise UserError(f"{where} has more than one image: {', '.join(given)}")
    if not given:
        return [Medium()]
    source = item[given[0]]
    if given == ["base64"]:
        return [_Source("image", opener(f"data:;base64,{source}", where))]
    return [_Source("image", opener(source, where))]


def _image(source: Any, where: str) -> Picture:
    """An image that can be opened: what a URL names or contains, anything else as it is."""
    if not isinstance(source, Picture):
        raise UserError(f"{where} has a {type(source).__name__} for an image: expected a path, a URL or an image")
    if isinstance(source, str) and is_url(source):
        return decode_image(read_url(source, where), f"the image in {where}")
    return _unopened(source, where)


def _unopened(source: Any, where: str) -> Any:
    """The path in a file:// URL; anything else as it is, unless it would have to be downloaded."""
    scheme, _, _ = source.partition(":") if isinstance(source, str) else ("", "", "")
    if scheme.lower() in ("http", "https"):
        raise UserError(f"{where} is at {source[:60]!r}, but nothing is downloaded: save the image and give its path")
    return urllib.parse.unquote(urllib.parse.urlsplit(source).path) if scheme.lower() == "file" else source


def _split(text: str) -> list[str | Medium | _Source]:
    """``text`` with a Medium for each ``<image>`` tag."""
    first, *rest = text.split(IMAGE_TAG)
    parts: list[str | Medium | _Source] = [first] if first else []
    for piece in rest:
        parts += [Medium(inline=True), piece] if piece else [Medium(inline=True)]
    return parts


def _placed(read: list[_Raw], images: list[Any]) -> tuple[list[Message], list[Any]]:
    """Messages and images, once each place without an image has received one of ``images``."""
    places = sum(isinstance(part, Medium) for _, parts in read for part in parts)
    if images and not places and not any(isinstance(part, _Source) for _, parts in read for part in parts):
        first = next(number for number, (role, _) in enumerate(read) if role == "user")
        read[first][1][:0] = [Medium()] * len(images)
    elif len(images) != places:
        count = plural(len(images), "picture")
        if not all(part.inline for _, parts in read for part in parts if isinstance(part, Medium)) or not places:
            message = f"the messages leave {plural(places, 'image')} to be given, but there are {count}"
        else:
            message = (
                f"the prompt has {plural(places, '<image> tag')} but {count}: give one picture for each tag, or no tag "
                "at all"
            )
        raise WrongCount(message, missing=len(images) < places)
    waiting = iter(images)
    messages, shown = [], []
    for role, raw in read:
        parts: list[str | Medium] = []
        for part in raw:
            if isinstance(part, str):
                parts.append(part)
                continue
            image = part.image if isinstance(part, _Source) else next(waiting)
            inline = isinstance(part, Medium) and part.inline
            bare = image.image if isinstance(image, Standby) else image
            kind: Kind = "video" if isinstance(bare, Video) or (image is None and part.kind == "video") else "image"
            parts.append(Medium(kind, inline))
            shown.append(image)
        messages.append(Message(role, tuple(parts)))
    return messages, shown


def plural(count: int, noun: str) -> str:
    """ "2 pictures"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
