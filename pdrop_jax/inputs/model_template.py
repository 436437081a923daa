"""A model's own chat template, the Jinja source that its tokenizer or processor ships, rendered by transformers.

Chat templates differ in what they accept: a message's content as a list of items or as text, a system message or none,
images or text alone. What this one accepts is found out by rendering short conversations with it.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pdrop_jax.batch import IGNORE
from pdrop_jax.errors import UserError, one_line
from pdrop_jax.inputs.chat_template import (
    IMAGE_PLACEHOLDER,
    IMAGE_TAG,
    ImagePlaces,
    Kind,
    check_reserved,
    check_unicode,
    token_ids,
    without_tags,
    write_captions,
)
from pdrop_jax.inputs.messages import Medium, Message, Role, plural
from pdrop_jax.inputs.targets import Example, TrainingText, tokenize_chunks
from pdrop_jax.io import check_file, read_json

OWN = "own"  # LlavaConfig.template of a model that is asked with its own chat template
PROBE = "PdropProbe"  # a text that no template contains
JINJA_BYTES = 2**20


def find_chat_template(folder: pathlib.Path) -> str | None:
    """The Jinja source of the chat template in a checkpoint's folder; None if it has none.

    The processor's goes before the tokenizer's, as in transformers. Of several templates it is the one named "default".

    Raises:
      UserError: a file is malformed.
    """
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        if path.suffix == ".jinja":
            check_file(path, JINJA_BYTES)
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path} is not UTF-8: copy it again") from None
        found = read_json(path).get("chat_template")
        if isinstance(found, list):  # of named templates
            found = next((x.get("template") for x in found if isinstance(x, dict) and x.get("name") == "default"), None)
        if found is not None:
            if not isinstance(found, str):
                raise UserError(f"{path} is malformed: its chat_template is a {type(found).__name__}, expected text")
            return found
    return None


@dataclasses.dataclass(frozen=True)
class ModelTemplate:
    """Renders conversations with a model's own chat template. It is used as ``LlavaTemplate``, see ``prompts``.

    Attributes:
      tokenizer: a transformers tokenizer.
      source: the template's Jinja source.
    """

    tokenizer: Any
    source: str
    places: ImagePlaces

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation. If the last message is from the user, it ends where the model continues.

        An image is its placeholder, or an ``<image>`` tag between marks that the template does not write.

        Raises:
          UserError: the template refuses the conversation, or does not write a placeholder for each image.
        """
        return self._render(messages, asks=messages[-1].role == "user")

    def ids(self, messages: Sequence[Message], captions: Sequence[Sequence[str]] = ()) -> list[int]:
        """Token ids of ``render``, with IMAGE_PLACEHOLDER for each image or video. Errors are those of ``render``.

        Args:
          captions: see ``chat_template.write_captions``.
        """
        text = write_captions(self.render(messages), captions, self.place)
        check_unicode(text)
        if not self._are_tokens(text):
            return token_ids(self.tokenizer, self._rendered.sub(IMAGE_TAG, text))
        ids = self.tokenizer(text, verbose=False, **self._special(text))["input_ids"]
        return [IMAGE_PLACEHOLDER if i in self._place_ids else i for i in ids]

    @functools.cached_property
    def place(self) -> str:
        """Regular expression of what stands for an image in ``render``, with the marks around it."""
        before, after = map(re.escape, self.places.marks)
        return f"{before}(?:{self._rendered.pattern}){after}"

    def without_places(self, text: str) -> str:
        """``text`` that a model wrote, without anything that stands for an image."""
        return without_tags(text, IMAGE_TAG, *self.places.placeholders.values(), *self.places.reserved)

    def check_trainable(self) -> None:
        """Raises UserError if the answers cannot be told from the rest, or their end could not be learned."""
        self.training_text([Message("user", ("Q",)), Message("assistant", ("A",))] * 2)

    def training_text(self, messages: Sequence[Message]) -> TrainingText:
        """The text of a conversation; its spans are what the model has to generate, up to its end token.

        Raises:
          UserError: the template refuses the conversation, or changes its answers or earlier messages.
        """
        asked, before, behind = self._answer
        if not before.startswith(asked):
            raise UserError(
                "the model's chat template asks for an answer with a text that its answers do not start with"
            )
        if self.end_token is None:
            raise UserError(
                "the model's own chat template ends its answers with no special token, so their end could not be "
                "learned: choose another template"
            )
        begins = before[len(asked) :]
        end = behind[: behind.index(self.end_token) + len(self.end_token)]
        messages = [
            dataclasses.replace(message, parts=(message.text.strip(),)) if message.role == "assistant" else message
            for message in messages
        ]
        blank = [
            dataclasses.replace(message, parts=(f"{PROBE}{n}.",)) if message.role == "assistant" else message
            for n, message in enumerate(messages)
        ]
        rest, text, spans = self._render(blank, asks=False), "", []
        for n, message in enumerate(messages):
            if message.role != "assistant":
                continue
            until_answer, _, rest = rest.partition(f"{PROBE}{n}.")
            text += until_answer
            if not text.endswith(begins):
                raise UserError(
                    "the model's chat template begins an answer differently once other messages follow: choose another "
                    "template"
                )
            start = len(text) - len(begins)
            text += message.text
            if not rest.startswith(end):
                raise UserError("the model's chat template ends an answer differently once other messages follow")
            spans.append((start, len(text) + len(end)))
        text += rest
        if self._render(messages, asks=False) != text:
            raise UserError("the model's chat template changes the answers of a conversation")
        return TrainingText(text, spans)

    def tokenize(self, texts: Sequence[TrainingText]) -> list[Example]:
        """Ids and labels of ``texts``. A token is a target if its last character is in a span; an image never is."""
        if all(self._are_tokens(text.text) for text in texts):
            return [self._example(text) for text in texts]
        return tokenize_chunks(self.tokenizer, texts)

    def _example(self, text: TrainingText) -> Example:
        encoding = self.tokenizer(text.text, verbose=False, **self._special(text.text)).encodings[0]
        ids, ends = np.array(encoding.ids, np.int32), np.array([stop for _, stop in encoding.offsets])
        is_place = np.isin(ids, self._place_ids)
        target = np.zeros(len(ids), bool)
        for start, stop in text.spans:
            target |= (start < ends) & (ends <= stop)
        labels = np.where(target & ~is_place, ids, IGNORE)
        return Example(np.where(is_place, IMAGE_PLACEHOLDER, ids).astype(np.int32), labels.astype(np.int32))

    def _render(self, messages: Sequence[Message], asks: bool) -> str:
        kinds = {medium.kind for message in messages for medium in message.media}
        if "video" in kinds and self.places.video_template is not None:
            return self._of_videos._render(messages, asks)
        given = [{"role": message.role, "content": self._content(message)} for message in messages]
        text = self._apply(given, asks)
        media, places = sum(len(message.media) for message in messages), len(self._places.findall(text))
        if media != places:
            raise UserError(
                f"the conversation has {plural(media, 'image')}, but its text by the model's chat template has places "
                f"for {places}: leave {' and '.join(self.places.placeholders.values())} out of questions and answers"
            )
        check_reserved(text, self.places.reserved, self.tokenizer)
        if not self.places.writes_marks:
            before, after = self.places.marks
            text = self._places.sub(f"{before}{IMAGE_TAG}{after}", text)
        return text

    @functools.cached_property
    def _of_videos(self) -> "ModelTemplate":
        """What renders conversations with a video, where that is another template."""
        assert self.places.video_template is not None
        places = dataclasses.replace(self.places, video_template=None)
        return dataclasses.replace(self, source=self.places.video_template, places=places)

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        shape = self._shapes[message.role]
        if shape is None:
            raise UserError(f"the model's chat template takes no {message.role} message: leave it out")
        if shape == "text":
            return message.text
        if not {medium.kind for medium in message.media} <= self._kinds:
            return [{"type": "text", "text": message.text}]
        items: list[dict[str, str]] = []
        before: str | Medium | None = None
        for part in message.parts:
            if isinstance(part, Medium):
                items.append({"type": part.kind})
            else:
                # A tag that was written on its own line stands for the line: the template has line breaks of its own.
                own_line = isinstance(before, Medium) and before.inline
                items.append({"type": "text", "text": part.removeprefix("\n") if own_line else part})
            before = part
        return items

    def _apply(self, messages: list[dict[str, Any]], asks: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise UserError(f"the model's chat template refuses the conversation: {one_line(error, 200)}") from None

    @functools.cached_property
    def _shapes(self) -> dict[Role, str | None]:
        """In which form the template takes the content of each role, "list" or "text"; None if it does not."""
        question: dict[str, Any] = {"role": "user", "content": "Q"}
        shapes: dict[Role, str | None] = {"user": self._shape([], "user", [])}
        if shapes["user"] is None:
            # What it says about text is the reason.
            self._apply([question], asks=True)
            raise UserError("the model's chat template does not write what the user asks: it cannot be used")
        if shapes["user"] == "list":
            question = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
        shapes["assistant"] = self._shape([question], "assistant", [question])
        shapes["system"] = self._shape([], "system", [question])
        return shapes

    def _shape(self, before: list[dict[str, Any]], role: Role, after: list[dict[str, Any]]) -> str | None:
        for shape, content in (("list", [{"type": "text", "text": PROBE}]), ("text", PROBE)):
            if self._writes_once([*before, {"role": role, "content": content}, *after], PROBE):
                return shape
        return None

    @functools.cached_property
    def _kinds(self) -> frozenset[Kind]:
        """The kinds of media that the template writes placeholders for. Others are written into its text as tags."""
        found = set()
        for kind, placeholder in self.places.placeholders.items():
            content = [{"type": kind}, {"type": "text", "text": PROBE}]
            if self._writes_once([{"role": "user", "content": content}], placeholder):
                found.add(kind)
        return frozenset(found)

    def _writes_once(self, messages: list[dict[str, Any]], sought: str) -> bool:
        try:
            text = self._apply(messages, asks=True)
        except UserError:
            return False
        # A template that takes text alone may write a list as Python or JSON would.
        return text.count(sought) == 1 and not any(f"{PROBE}{end}" in text for end in ("'}", '"}'))

    @functools.cached_property
    def _answer(self) -> tuple[str, str, str]:
        """The text of a question up to where the model continues, and what stands before and behind its answer."""
        question = Message("user", ("Q",))
        asked = self._render([question], asks=True)
        before, _, behind = self._render([question, Message("assistant", (PROBE,))], asks=False).partition(PROBE)
        return asked, before, behind

    @functools.cached_property
    def end_token(self) -> str | None:
        """The token that ends an answer; None if the template writes no such token, or takes no answers."""
        try:
            behind = self._answer[2]
        except UserError:
            return None
        found = [(behind.index(token), token) for token in self._added if token.strip() and token in behind]
        return min(found, key=lambda at: (at[0], -len(at[1])))[1] if found else None

    @functools.cached_property
    def _added(self) -> dict[str, int]:
        return {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items()}

    @functools.cached_property
    def _places(self) -> re.Pattern[str]:
        return re.compile(
            "|".join(map(re.escape, sorted({IMAGE_TAG, *self.places.placeholders.values()}, key=len)[::-1]))
        )

    @property
    def _rendered(self) -> re.Pattern[str]:
        """What stands for an image once ``_render`` has written marks around it; these may hold placeholders."""
        return self._places if self.places.writes_marks else re.compile(re.escape(IMAGE_TAG))

    @functools.cached_property
    def _place_ids(self) -> list[int]:
        placeholders = self.places.placeholders.values() if self.places.writes_marks else ()
        return [self._added[place] for place in (IMAGE_TAG, *placeholders) if place in self._added]

    def _are_tokens(self, text: str) -> bool:
        """Whether everything in ``text`` that stands for an image is a token, so that it need not be split there."""
        return set(self._rendered.findall(text)) <= self._added.keys()

    def _special(self, text: str) -> dict[str, bool]:
        """Options of the tokenizer: BOS is added unless the template writes it, as in transformers' processors."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": not (bos and text.startswith(bos))}
