"""Static shapes of batches: few of them, so that little is ever compiled."""

from collections.abc import Sequence

import numpy as np

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageTokens, levels
from pdrop_jax.inputs.assemble import Row
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER

MIN_TEXT_SLOTS = 32


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


def bucket_for(text: int, images: Sequence[int], config: LlavaConfig) -> Bucket:
    """The bucket of ``text`` slots and images of so many tokens, with the crops that pictures of that size have.

    Raises:
      UserError: the model cuts no picture into so many tokens.
    """
    if config.tiling:
        crops = sum(level_of(1, tokens, config)[0] for tokens in images)
    else:
        crops = -(-sum(images) // config.image_tokens)
    return Bucket(text, tuple(images), crops)


def level_of(crops: int, tokens: int, config: LlavaConfig, video: bool = False) -> tuple[int, int]:
    """The smallest of ``anyres.levels`` that holds so many; of a video the frames are rounded up to a power of two.

    Raises:
      UserError: none does.
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
