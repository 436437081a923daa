"""Processor: prompts and images -> Batch, token ids -> text."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.families.gemma3.inputs import crops, cuts, with_crops
from pdrop_jax.inputs.anyres import ImageTokens
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.chat_template import IMAGE_TAG, TEMPLATES, Turn, place_images, render, token_ids
from pdrop_jax.inputs.images import Picture, Video, as_tokens, frames_as_tokens, load_image_processor, open_image
from pdrop_jax.inputs.tokenizer import load_tokenizer

Prompt = str | Sequence[Turn]
Entry = Picture | Video | Sequence[Picture | Video] | None  # the images of a prompt


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns prompts and images into a Batch, and token ids into text.

    Attributes:
      tokenizer: a transformers tokenizer.
      image_processor: see ``images.load_image_processor``.
    """

    config: LlavaConfig
    tokenizer: Any
    image_processor: Any

    @classmethod
    def load(cls, folder: str | os.PathLike, config: LlavaConfig) -> "Processor":
        """Reads the tokenizer and the image processor from a checkpoint's folder. Nothing is downloaded.

        Raises:
          UserError: the tokenizer is missing or cannot be read; see also ``images.load_image_processor``.
        """
        folder = pathlib.Path(folder)
        return cls(config, load_tokenizer(folder), load_image_processor(folder, config))

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
          prompts: questions, or conversations as lists of (question, answer) whose last answer may be None.
          images: for each prompt None, an image, a ``Video`` or a list of these; ``images.open_image`` says what may
            be an image.
          template: a name in ``chat_template.TEMPLATES`` (default: the checkpoint's).
          max_new_tokens: positions to reserve for the answer; the batch has no slots for them.

        Raises:
          UserError: the lists differ in length, a prompt has another number of tags than images, an image cannot be
            read, or a prompt is too long.
        """
        if isinstance(prompts, str):
            raise UserError("prompts must be a list of questions, got one string: put it in a list")
        if images is None:
            images = [None] * len(prompts)
        if isinstance(images, Picture | Video) or len(images) != len(prompts):
            count = 1 if isinstance(images, Picture | Video) else len(images)
            raise UserError(
                f"{len(prompts)} prompts but {count} entries of pictures: give one for each prompt, a picture, a list "
                "or None"
            )
        rows = [self.row(prompt, as_list(entry), template) for prompt, entry in zip(prompts, images, strict=True)]
        return assemble(rows, self.config, choose_bucket(rows, self.config, max_new_tokens))

    def row(self, prompt: Prompt, images: Sequence[Picture | Video], template: str | None = None) -> Row:
        """One row; arguments and errors are those of ``__call__``."""
        turns, images = self.with_crops(prompt, images, template)
        ids = self.ids(turns, len(images), template)
        return Row(ids, [self.tokens(image, alone=len(images) == 1) for image in images])

    def with_crops(
        self, prompt: Prompt, images: Sequence[Picture | Video], template: str | None = None
    ) -> tuple[Sequence[Turn], Sequence[Picture | Video]]:
        """A prompt with a tag for each image, and its images; crops of pan-and-scan are further tags and images.

        Raises:
          UserError: the prompt has tags, but not as many as images; an image cannot be read.
        """
        turns = place_images(turns_of(prompt), len(images), template or self.config.template)
        found = [[image] if isinstance(image, Video) else self._crops(image) for image in images]
        if all(len(crops) == 1 for crops in found):
            return turns, images
        tags = iter([with_crops(IMAGE_TAG, len(crops) - 1) for crops in found])
        return [
            (fill_tags(question, tags), None if answer is None else fill_tags(answer, tags))
            for question, answer in turns
        ], [crop for crops in found for crop in crops]

    def _crops(self, image: Picture) -> list[Picture]:
        if not cuts(self.image_processor):
            return [image]
        opened = open_image(image)
        return [opened, *crops(opened, self.image_processor)]

    def ids(self, prompt: Prompt, num_images: int, template: str | None = None) -> list[int]:
        """Token ids of a row with ``num_images`` images, each an IMAGE_PLACEHOLDER.

        Raises:
          UserError: the prompt has tags, but not ``num_images`` of them.
        """
        template = template or self.config.template
        return token_ids(self.tokenizer, render(place_images(turns_of(prompt), num_images, template), template))

    def tokens(self, image: Picture | Video, alone: bool) -> ImageTokens:
        """The model's input for an image; ``alone`` says whether its row has no other."""
        if isinstance(image, Video):
            return frames_as_tokens(image, self.image_processor, self.config)
        return as_tokens(open_image(image), self.image_processor, self.config, alone=alone)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, ascending: the model's EOS and the end-of-turn tokens that its tokenizer has."""
        # Only added tokens: another model's end token may be ordinary text in this vocabulary.
        special = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items()}
        ends = {special[t.end_token] for t in TEMPLATES.values() if t.end_token in special}
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


def turns_of(prompt: Prompt) -> Sequence[Turn]:
    return [(prompt, None)] if isinstance(prompt, str) else prompt


def fill_tags(text: str, tags: Iterator[str]) -> str:
    """``text`` with the next of ``tags`` for each ``<image>``."""
    first, *rest = text.split(IMAGE_TAG)
    return first + "".join(next(tags) + part for part in rest)


def as_list(entry: Entry) -> Sequence[Picture | Video]:
    if entry is None:
        return []
    return [entry] if isinstance(entry, Picture | Video) else entry
