"""Buckets: the static shapes of batches, few of them so that little is compiled."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageTokens, levels
from pdrop_jax.inputs.assemble import Row
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER

MIN_TEXT_SLOTS = 32


class ImageSize(NamedTuple):
    """What a bucket depends on of an image: its crops, or a video's frames, and its tokens."""

    crops: int
    tokens: int
    video: bool = False


def image_sizes(images: Sequence[ImageTokens]) -> list[ImageSize]:
    return [ImageSize(len(image.crops), len(image), image.video) for image in images]


def text_length(ids: Sequence[int] | np.ndarray) -> int:
    """Number of text tokens, without image placeholders."""
    return int((np.asarray(ids) != IMAGE_PLACEHOLDER).sum())


def choose_bucket(rows: Sequence[Row], config: LlavaConfig, max_new_tokens: int = 0) -> Bucket:
    """``bucket_of_sizes`` of rows."""
    sizes = [(text_length(row.ids), image_sizes(row.images)) for row in rows]
    return bucket_of_sizes(sizes, config, max_new_tokens)


def bucket_of_sizes(
    rows: Sequence[tuple[int, Sequence[ImageSize]]], config: LlavaConfig, max_new_tokens: int = 0
) -> Bucket:
    """The smallest bucket that holds every row, given as its number of text tokens and the sizes of its images.

    Text slots are 32, 64, 128, ... up to the model's positions. The number of images is 0, 1, 2, 4, ..., and each has
    one of the sizes in ``anyres.levels``. So few shapes are compiled.

    Raises:
      UserError: a row with its images and the new tokens needs more positions than the model has.
    """
    most_text = 0
    for number, (text, sizes) in enumerate(rows, 1):
        images = sum(size.tokens for size in sizes)
        needed = text + images + max_new_tokens
        if needed > config.text.max_length:
            raise UserError(
                f"prompt {number} needs {needed} positions ({text} text tokens + {images} image tokens of "
                f"{len(sizes)} pictures + {max_new_tokens} new tokens) but the model has "
                f"{config.text.max_length}: shorten the prompt, give fewer pictures or ask for fewer new tokens"
            )
        most_text = max(most_text, text)
    slots = min(max(_power_of_two(most_text), MIN_TEXT_SLOTS), config.text.max_length)
    return image_bucket(slots, [sizes for _, sizes in rows], config)


def image_bucket(text: int, rows: Sequence[Sequence[ImageSize]], config: LlavaConfig) -> Bucket:
    """The bucket of ``text`` slots for rows with images of these sizes."""
    found = [[level_of(size.crops, size.tokens, config, size.video) for size in row] for row in rows]
    columns = [[row[m] for row in found if m < len(row)] for m in range(max(map(len, rows), default=0))]
    largest = [(max(crops for crops, _ in column), max(tokens for _, tokens in column)) for column in columns]
    return bucket_of(text, largest, config)


def bucket_of(text: int, images: Sequence[tuple[int, int]], config: LlavaConfig) -> Bucket:
    """The bucket of ``text`` slots and ``images`` (crops, tokens), whose number is rounded up to 0, 1, 2, 4, ...."""
    images = [*images, *levels(config)[:1] * (_power_of_two(len(images)) - len(images))]
    return Bucket(text, tuple(tokens for _, tokens in images), sum(crops for crops, _ in images))


def bucket_for(text: int, images: Sequence[int], config: LlavaConfig) -> Bucket:
    """The bucket of ``text`` slots and images of these numbers of tokens, with the crops that images of that size have.

    Raises:
      UserError: no image of this model has that many tokens.
    """
    if config.tiling:
        crops = sum(level_of(1, tokens, config)[0] for tokens in images)
    else:
        crops = -(-sum(images) // config.image_tokens)
    return Bucket(text, tuple(images), crops)


def level_of(crops: int, tokens: int, config: LlavaConfig, video: bool = False) -> tuple[int, int]:
    """The smallest of ``anyres.levels`` that holds an image; the frames of a video are rounded up to a power of two.

    Raises:
      UserError: the image is larger than all of them.
    """
    if video:
        frames = 1 << (crops - 1).bit_length()
        return frames, -(-tokens // crops) * frames
    known = levels(config)
    for level in known:
        if crops <= level[0] and tokens <= level[1]:
            return level
    raise UserError(
        f"a picture of {crops} crops and {tokens} tokens is larger than the largest of this model, {known[-1][0]} "
        f"crops and {known[-1][1]} tokens"
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length() if n else 0
