"""Processor: prompts and pictures -> Batch, token ids -> text."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pdrop_jax.batch import IGNORE, Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import NEWLINE, ImageTokens, level_of, levels
from pdrop_jax.inputs.conversation import (
    IMAGE_PLACEHOLDER,
    TEMPLATES,
    Turn,
    place_images,
    render,
    token_ids,
)
from pdrop_jax.inputs.images import Picture, Video, as_tokens, frames_as_tokens, load_image_processor, open_image
from pdrop_jax.inputs.tokenizer import load_tokenizer
from pdrop_jax.schedule import Bucket

MIN_TEXT_SLOTS = 32

Prompt = str | Sequence[Turn]
Entry = Picture | Video | Sequence[Picture | Video] | None  # what a prompt speaks of


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch before it is laid out.

    Attributes:
      ids: token ids; IMAGE_PLACEHOLDER stands for a whole image.
      images: one for each placeholder, in order.
      labels: in training, for each of ``ids`` the id itself where it is a target, IGNORE elsewhere.
    """

    ids: Sequence[int] | np.ndarray
    images: Sequence[ImageTokens] = ()
    labels: Sequence[int] | np.ndarray | None = None


def choose_bucket(rows: Sequence[Row], config: LlavaConfig, max_new_tokens: int = 0) -> Bucket:
    """The smallest bucket that holds every row.

    Text slots are 32, 64, 128, ... up to the model's positions, images 0, 1, 2, 4, ..., each of one of
    ``anyres.levels``: few shapes to compile.

    Raises:
      UserError: a row with its images and the new tokens needs more positions than the model has.
    """
    most_text = 0
    for number, row in enumerate(rows, 1):
        images = sum(map(len, row.images))
        text = int((np.asarray(row.ids) != IMAGE_PLACEHOLDER).sum())
        needed = text + images + max_new_tokens
        if needed > config.text.max_length:
            raise UserError(
                f"prompt {number} needs {needed} positions ({text} text tokens + {images} image tokens of "
                f"{len(row.images)} pictures + {max_new_tokens} new tokens) but the model has "
                f"{config.text.max_length}: shorten the prompt, give fewer pictures or ask for fewer new tokens"
            )
        most_text = max(most_text, text)
    slots = min(max(_power_of_two(most_text), MIN_TEXT_SLOTS), config.text.max_length)
    return image_bucket(slots, [row.images for row in rows], config)


def image_bucket(text: int, rows: Sequence[Sequence[ImageTokens]], config: LlavaConfig) -> Bucket:
    """The bucket of ``text`` slots for rows of such images."""
    found = [[level_of(len(x.crops), len(x), config, x.video) for x in row] for row in rows]
    columns = [[row[m] for row in found if m < len(row)] for m in range(max(map(len, rows), default=0))]
    largest = [(max(crops for crops, _ in column), max(tokens for _, tokens in column)) for column in columns]
    return bucket_of(text, largest, config)


def bucket_of(text: int, images: Sequence[tuple[int, int]], config: LlavaConfig) -> Bucket:
    """The bucket of ``text`` slots and of images of so many (crops, tokens), their number rounded up: 0, 1, 2, 4, …."""
    images = [*images, *levels(config)[:1] * (_power_of_two(len(images)) - len(images))]
    return Bucket(text, tuple(tokens for _, tokens in images), sum(crops for crops, _ in images))


def assemble(rows: Sequence[Row], config: LlavaConfig, bucket: Bucket, queries: int = 1) -> Batch:
    """Lay out rows as the arrays of a Batch: B = len(rows), Q = queries.

    The crops of a row's images lie one after another. B is not rounded up: a caller who varies it pays one compilation
    for each B.

    Without labels the query row is the last slot of the prompt. If any row has labels, the batch has, and the query
    rows of a row are the slots right before each run of targets; a row without target has its last text slot.

    Raises:
      UserError: no rows, an empty row, a row that does not fit, placeholders and images that differ in number, crops of
        another size than the vision tower's, an id outside the vocabulary, labels that are not as many as the ids.
    """
    if not rows:
        raise UserError("a batch needs at least one prompt, got none")
    B, S, C, size = len(rows), bucket.slots, bucket.crops, config.vision.image_size
    T = 4 if any(image.weight is not None for row in rows for image in row.images) else config.taps
    token_ids = np.zeros((B, S), np.int32)
    feature_index = np.full((B, S, T), -1, np.int32)
    feature_weight = np.zeros((B, S, T), np.float32)
    image_id = np.zeros((B, S), np.int32)
    length = np.zeros(B, np.int32)
    crops = np.zeros((B, C, size, size, 3), np.float32)
    query_rows = np.full((B, queries), -1, np.int32)
    labels = np.full((B, S), IGNORE, np.int32) if any(row.labels is not None for row in rows) else None
    for b, row in enumerate(rows):
        _check_row(b + 1, row, config, bucket)
        ids, images = expand(row.ids, [len(image) for image in row.images])
        n = length[b] = len(ids)
        token_ids[b, :n], image_id[b, :n] = ids, images
        used = 0
        for m, image in enumerate(row.images, 1):
            index, feature_weight[b, :n][images == m] = image.widened(T)
            first, features = 0, config.image_tokens
            if image.video and config.frame_tokens:
                first, features = C * config.image_tokens, config.frame_tokens
            newline = C * (config.image_tokens + config.frame_tokens)
            feature_index[b, :n][images == m] = np.where(index == NEWLINE, newline, first + used * features + index)
            crops[b, used : used + len(image.crops)] = image.crops
            used += len(image.crops)
        found = np.array([n - 1])
        if labels is not None:
            if row.labels is not None:
                labels[b, :n][images == 0] = np.asarray(row.labels, np.int32)[np.asarray(row.ids) != IMAGE_PLACEHOLDER]
            found = _query_rows(labels[b, :n], images)
        if len(found) > queries:
            raise UserError(f"prompt {b + 1} has {len(found)} runs of targets, but its batch holds {queries}")
        query_rows[b, : len(found)] = found
    weight = feature_weight if T > 1 else None
    return Batch(token_ids, feature_index, image_id, length, crops, query_rows, labels, bucket, weight)


def _query_rows(labels: np.ndarray, image_id: np.ndarray) -> np.ndarray:
    """Slots right before a run of targets, ascending; the last text slot if there is no run. Both arguments (n,) int32.

    A target in slot 0 begins no run: nothing stands before it.
    """
    target = labels != IGNORE
    found = np.flatnonzero(target[1:] & ~target[:-1])
    if len(found):
        return found
    text = np.flatnonzero(image_id == 0)
    return text[-1:] if len(text) else np.array([len(labels) - 1])


def expand(ids: Sequence[int] | np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Give each placeholder the slots of its image.

    For ``[1, 7, -200, 8]`` and an image of 3 tokens::

      token_ids  1  7  0  0  0  8
      image_id   0  0  1  1  1  0

    Args:
      sizes: tokens of each image.

    Returns:
      token_ids and image_id of one row, int32, as long as the row gets.
    """
    row = np.asarray(ids, np.int32)
    is_image = row == IMAGE_PLACEHOLDER
    slots = np.ones(len(row), int)
    slots[is_image] = sizes
    in_image = np.repeat(is_image, slots)
    token_ids = np.where(in_image, 0, np.repeat(row, slots))
    image_id = np.where(in_image, np.repeat(np.cumsum(is_image), slots), 0)
    return token_ids.astype(np.int32), image_id.astype(np.int32)


def _check_row(number: int, row: Row, config: LlavaConfig, bucket: Bucket) -> None:
    ids, size, vocab_size = np.asarray(row.ids), config.vision.image_size, config.text.vocab_size
    placeholders = int((ids == IMAGE_PLACEHOLDER).sum())
    text = ids[ids != IMAGE_PLACEHOLDER]
    if not len(ids):
        raise UserError(f"prompt {number} has no tokens")
    if row.labels is not None and len(row.labels) != len(ids):
        raise UserError(f"prompt {number} has {len(ids)} tokens but {len(row.labels)} labels")
    if placeholders != len(row.images):
        raise UserError(f"prompt {number} has {placeholders} image placeholders but {len(row.images)} pictures")
    if len(text) > bucket.text or placeholders > len(bucket.images):
        raise UserError(
            f"prompt {number} has {len(text)} text tokens and {placeholders} images, but its bucket holds "
            f"{bucket.text} and {len(bucket.images)}"
        )
    tokens, crops = [len(image) for image in row.images], sum(len(image.crops) for image in row.images)
    if crops > bucket.crops or any(n > most for n, most in zip(tokens, bucket.images, strict=False)):
        raise UserError(
            f"prompt {number} has images of {tokens} tokens in {crops} crops, but its bucket holds "
            f"{list(bucket.images)} in {bucket.crops}"
        )
    if len(text) and not 0 <= text.min() <= text.max() < vocab_size:
        raise UserError(
            f"prompt {number} has token ids {text.min()}..{text.max()} but the model knows 0..{vocab_size - 1}: "
            "the tokenizer belongs to another model"
        )
    for image in row.images:
        if image.crops.shape[1:] != (size, size, 3):
            raise UserError(
                f"prompt {number} has crops of shape {image.crops.shape[1:]}, the vision tower takes {size, size, 3}"
            )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length() if n else 0


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns prompts and pictures into a Batch, and token ids into text.

    Attributes:
      tokenizer: a transformers tokenizer.
      image_processor: see ``images.load_image_processor``.
    """

    config: LlavaConfig
    tokenizer: Any
    image_processor: Any

    @classmethod
    def load(cls, folder: str | os.PathLike, config: LlavaConfig) -> "Processor":
        """Read the tokenizer and the image processor beside a checkpoint; nothing is ever downloaded.

        Raises:
          UserError: there is no tokenizer or it cannot be read; see also ``images.load_image_processor``.
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
        """The batch of ``prompts``, one row each.

        Args:
          prompts: questions, or conversations as lists of (question, answer) whose last answer may be None.
          images: for each prompt None, a picture, a ``Video`` or a list of them; see ``images.open_image`` for what
            is a picture.
          template: a name in ``conversation.TEMPLATES``; the checkpoint's own if None.
          max_new_tokens: positions to leave for the answer; only checked, the batch has no slots for them.

        Raises:
          UserError: lists of different length, tags and pictures that differ in number, a picture that cannot be read,
            a prompt that is too long.
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
        """One row; see ``__call__`` for what it takes and raises."""
        ids = self.ids(prompt, len(images), template)
        return Row(ids, [self.tokens(image, alone=len(images) == 1) for image in images])

    def ids(self, prompt: Prompt, num_images: int, template: str | None = None) -> list[int]:
        """Token ids of a row with so many pictures, IMAGE_PLACEHOLDER for each of them.

        Raises:
          UserError: it has tags, but another number of them.
        """
        turns = [(prompt, None)] if isinstance(prompt, str) else prompt
        return token_ids(self.tokenizer, render(place_images(turns, num_images), template or self.config.template))

    def tokens(self, image: Picture | Video, alone: bool) -> ImageTokens:
        """A picture as the model takes it; ``alone`` says whether its row has no other."""
        if isinstance(image, Video):
            return frames_as_tokens(image, self.image_processor, self.config)
        return as_tokens(open_image(image), self.image_processor, self.config, alone=alone)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the model's EOS and whichever turn-ending tokens its tokenizer has, ascending."""
        # Not its whole vocabulary: a mark of another model may be ordinary text to it.
        special = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items()}
        ends = {special[t.end_token] for t in TEMPLATES.values() if t.end_token in special}
        return tuple(sorted(ends.union(self.config.eos_token_ids)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer: special tokens left out, white space at both ends stripped."""
        text: str = self.tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()

    def stream(self) -> "TextStream":
        """A fresh decoder for one answer that arrives token by token."""
        return TextStream(self)


class TextStream:
    """Text of an answer that arrives token by token; the pieces joined are exactly ``processor.decode(ids)``.

    The text so far is decoded again at every token, for a piece alone loses its leading space, and is held back while
    a later token could still change it. Of the decoders that exist, tokenizers' DecodeStream raises on bytes that are
    no UTF-8 and transformers' TextStreamer drops the space after a line break.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        added = processor.tokenizer.added_tokens_decoder
        self._special = {i for i, token in added.items() if token.special}
        self._ids: list[int] = []
        self._shown = 0

    def put(self, token_id: int) -> str:
        """The text that is settled now that ``token_id`` has come; may be empty."""
        piece = self._processor.tokenizer.convert_ids_to_tokens(int(token_id))
        if token_id in self._special or piece is None:  # an embedding beyond the vocabulary has no piece
            return ""
        self._ids.append(int(token_id))
        is_byte = len(piece) == 6 and piece.startswith("<0x")
        return "" if is_byte else self._rest(final=False)

    def end(self) -> str:
        """The text still held back."""
        return self._rest(final=True)

    def _rest(self, final: bool) -> str:
        text = self._processor.decode(self._ids)
        if text.endswith("\ufffd") and not final:
            return ""
        new, self._shown = text[self._shown :], len(text)
        return new


def as_list(entry: Entry) -> Sequence[Picture | Video]:
    if entry is None:
        return []
    return [entry] if isinstance(entry, Picture | Video) else entry
