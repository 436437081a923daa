"""Processor: prompts and images -> Batch, token ids -> text."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageTokens, captions_of
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.chat_template import LLAVA_PLACES, TEMPLATES
from pdrop_jax.inputs.families import FAMILIES
from pdrop_jax.inputs.frames import Standby, standby_as_tokens
from pdrop_jax.inputs.images import Picture, Video, as_tokens, frames_as_tokens, load_image_processor, open_image
from pdrop_jax.inputs.messages import Prompt, read_conversation
from pdrop_jax.inputs.model_template import OWN, find_chat_template
from pdrop_jax.inputs.prompts import PromptTemplate, prompt_template
from pdrop_jax.inputs.tokenizer import OPENED, load_tokenizer
from pdrop_jax.io import local_copy
from pdrop_jax.paths import as_path

Image = Picture | Video | Standby
Entry = Image | Sequence[Image] | None  # the images of a prompt


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns prompts and images into a Batch, and token ids into text.

    Attributes:
      tokenizer: a transformers tokenizer.
      image_processor: see ``images.load_image_processor``.
      chat_template: Jinja source of the checkpoint's own chat template, if it has one.
    """

    config: LlavaConfig
    tokenizer: Any
    image_processor: Any
    chat_template: str | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike, config: LlavaConfig) -> "Processor":
        """Reads tokenizer, image processor and chat template from a checkpoint's folder. Nothing is downloaded.

        Raises:
          UserError: the tokenizer or the chat template is missing or cannot be read; see also
            ``images.load_image_processor``.
        """
        with local_copy(as_path(folder), OPENED) as place:
            tokenizer, image_processor = load_tokenizer(place), load_image_processor(place, config)
            processor = cls(config, tokenizer, image_processor, find_chat_template(place))
        processor.prompts()
        return processor

    def __call__(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[Entry] | None = None,
        *,
        template: str | None = None,
        max_new_tokens: int = 0,
    ) -> Batch:
        """The batch of ``prompts``, one row per prompt.

        Args:
          prompts: questions, or conversations; ``messages.read_conversation`` says what may be one.
          images: for each prompt None, an image, a ``Video``, a ``Standby`` of either, or a list of these;
            ``images.open_image`` says what may be an image.
          template: "own" or a name in ``chat_template.TEMPLATES`` (default: the checkpoint's).
          max_new_tokens: positions to reserve for the answer; the batch has no slots for them.

        Raises:
          UserError: the lists differ in length, a prompt has another number of tags than images or is malformed, an
            image cannot be read, or a prompt is too long.
        """
        if isinstance(prompts, str):
            raise UserError("prompts must be a list of questions, got one string: put it in a list")
        if any(isinstance(prompt, Mapping) for prompt in prompts):
            raise UserError("prompts must be a list of conversations, got the messages of one: put them in a list")
        if images is None:
            images = [None] * len(prompts)
        if isinstance(images, Image) or len(images) != len(prompts):
            count = 1 if isinstance(images, Image) else len(images)
            raise UserError(
                f"{len(prompts)} prompts but {count} entries of pictures: give one for each prompt, a picture, a list "
                "or None"
            )
        rows = [self.row(prompt, as_list(entry), template) for prompt, entry in zip(prompts, images, strict=True)]
        return assemble(rows, self.config, choose_bucket(rows, self.config, max_new_tokens))

    def row(self, prompt: Prompt, images: Sequence[Image], template: str | None = None) -> Row:
        """One row; arguments and errors are those of ``__call__``."""
        messages, shown = read_conversation(prompt, images)
        found = self.all_tokens(shown)
        return Row(self.prompts(template).ids(messages, captions_of(found)), found)

    def prompts(self, template: str | None = None) -> PromptTemplate:
        """The template that renders conversations: the checkpoint's, or another one by its name."""
        if template is None:
            return self._prompts
        return self._prompts_named(template)

    @functools.cached_property
    def _prompts(self) -> PromptTemplate:
        return self._prompts_named(self.config.template)

    def _prompts_named(self, template: str) -> PromptTemplate:
        family = FAMILIES.get(self.config.family)
        places = family.places if family else LLAVA_PLACES
        return prompt_template(template, self.tokenizer, self.chat_template, places)

    def all_tokens(self, images: Sequence[Image]) -> list[ImageTokens]:
        """``tokens`` of the images of one row; with pan-and-scan each image is followed by its crops."""
        alone, found, family = len(images) == 1, list[ImageTokens](), FAMILIES.get(self.config.family)
        for image in images:
            shown: Sequence[Image] = [image] if isinstance(image, Video | Standby) else self.with_crops(image)
            tokens = [self.tokens(picture, alone) for picture in shown]
            found += family.with_captions(tokens) if family else tokens
        return found

    def with_crops(self, image: Picture) -> list[Picture]:
        """An image, followed by its crops if the image processor has pan-and-scan on."""
        family = FAMILIES.get(self.config.family)
        if not family or not family.cuts(self.image_processor):
            return [image]
        whole = open_image(image)
        return [whole, *family.crops(whole, self.image_processor)]

    def tokens(self, image: Image, alone: bool) -> ImageTokens:
        """The model's input for an image; ``alone`` says whether its row has no other."""
        if isinstance(image, Standby):
            return standby_as_tokens(image, self.image_processor, self.config)
        if isinstance(image, Video):
            return frames_as_tokens(image, self.image_processor, self.config)
        return as_tokens(open_image(image), self.image_processor, self.config, alone=alone)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, ascending: the model's EOS and the end-of-turn tokens that its tokenizer has."""
        # Only added tokens: another model's end token may be ordinary text in this vocabulary.
        special = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items()}
        ends = {special[t.end_token] for t in TEMPLATES.values() if t.end_token in special}
        if self.config.template == OWN and (own := self.prompts().end_token):
            ends.add(special[own])
        return tuple(sorted(ends.union(self.config.eos_token_ids)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer, without special tokens and without white space at both ends."""
        text: str = self.tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()

    def stream(self) -> "TextStream":
        """A new streaming decoder for one answer."""
        return TextStream(self)


class TextStream:
    """Streaming decoder of one answer; the pieces joined are exactly ``processor.decode(ids)``.

    The whole text is decoded again at each token, because a single piece loses its leading space, and text is held back
    while a later token could still change it. Of the existing decoders, tokenizers' DecodeStream raises on bytes that
    are not UTF-8 and transformers' TextStreamer drops the space after a line break.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        added = processor.tokenizer.added_tokens_decoder
        self._special = {i for i, token in added.items() if token.special}
        self._ids: list[int] = []
        self._shown = 0

    def put(self, token_id: int) -> str:
        """The text that ``token_id`` makes final; may be empty."""
        piece = self._processor.tokenizer.convert_ids_to_tokens(int(token_id))
        if token_id in self._special or piece is None:  # embeddings beyond the vocabulary have no piece
            return ""
        self._ids.append(int(token_id))
        is_byte = len(piece) == 6 and piece.startswith("<0x")
        return "" if is_byte else self._rest(final=False)

    def end(self) -> str:
        """The text that is still held back."""
        return self._rest(final=True)

    def _rest(self, final: bool) -> str:
        text = self._processor.decode(self._ids)
        if text.endswith("\ufffd") and not final:
            return ""
        new, self._shown = text[self._shown :], len(text)
        return new


def as_list(entry: Entry) -> Sequence[Image]:
    if entry is None:
        return []
    return [entry] if isinstance(entry, Image) else entry
