"""Buckets: static shapes of batches. Sizes are rounded up to a few steps so that few shapes are compiled.

A bucket follows from sizes alone: the number of text tokens of each row and the (crops, tokens) of its images.
"""

from collections.abc import Sequence

import numpy as np

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageSize, levels
from pdrop_jax.inputs.assemble import Row
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER

MIN_TEXT_SLOTS = 32


def choose_bucket(rows: Sequence[Row], config: LlavaConfig, max_new_tokens: int = 0) -> Bucket:
    """``smallest_bucket`` for rows whose images have been read."""
    texts = [text_tokens(row) for row in rows]
    return smallest_bucket(texts, [[image.size for image in row.images] for row in rows], config, max_new_tokens)


def text_tokens(row: Row) -> int:
    """Tokens of a row that take slots of text: standby tokens too, which are never dropped."""
    return int((np.asarray(row.ids) != IMAGE_PLACEHOLDER).sum()) + sum(image.standby for image in row.images)


def smallest_bucket(
    texts: Sequence[int], images: Sequence[Sequence[ImageSize]], config: LlavaConfig, max_new_tokens: int = 0
) -> Bucket:
    """The smallest bucket that holds every row.

    Text slots are 32, 64, 128, … up to the model's positions; images 0, 1, 2, 4, …, each of one of ``anyres.levels``.

    Args:
      texts: text tokens of each row.
      images: sizes of each row's images.
      max_new_tokens: positions to reserve for the answer; the bucket has no slots for them.

    Raises:
      UserError: a row with its images and the new tokens needs more positions than the model has.
    """
    for number, (text, sizes) in enumerate(zip(texts, images, strict=True), 1):
        image_tokens = sum(size.tokens for size in sizes)
        needed = text + image_tokens + max_new_tokens
        if needed > config.text.max_length:
            raise UserError(
                f"prompt {number} needs {needed} positions ({text} text tokens + {image_tokens} image tokens of "
                f"{len(sizes)} pictures + {max_new_tokens} new tokens), but the model has {config.text.max_length}: "
                "shorten the prompt, give fewer pictures or ask for fewer new tokens"
            )
    slots = min(max(power_of_two(max(texts, default=0)), MIN_TEXT_SLOTS), config.text.max_length)
    return image_bucket(slots, images, config)


def prompt_buckets(config: LlavaConfig, most: int, images: int = 1) -> list[Bucket]:
    """A few buckets for prompts of up to ``most`` tokens: the largest image that leaves 32 to the text, and text.

    Text slots are 64, 256, 1024, … and what remains of ``most`` beside that image. Text alone is not longer either: it
    would be as long in the later stages, where image tokens are few. Of the levels that an image can have, those are
    taken that are at least twice as large as the one before, and the largest. For 2, 4, 8, … images, up to ``images``,
    there is one bucket each, of the largest level that leaves 32 to the text.
    """
    known = [level for level in levels(config) if level[1] + MIN_TEXT_SLOTS <= most]
    taken = list[tuple[int, int]]()
    for level in known:
        if not taken or level[1] >= 2 * taken[-1][1] or level == known[-1]:
            taken.append(level)
    longest = most - max((tokens for _, tokens in known), default=0)
    texts = [*(4**n for n in range(3, 16) if 4**n < longest), longest]
    found = [bucket_of(text, shown, config) for shown in ([], *([level] for level in taken)) for text in texts]
    count = 2
    while count <= images and (fit := [level for level in known if count * level[1] + MIN_TEXT_SLOTS <= most]):
        found.append(bucket_of(min(longest, most - count * fit[-1][1]), [fit[-1]] * count, config))
        count *= 2
    return found


def bucket_among(buckets: Sequence[Bucket], row: Row) -> Bucket:
    """The smallest of ``buckets`` that holds a row.

    Raises:
      UserError: none does.
    """
    text = text_tokens(row)
    tokens, crops = [image.size.tokens for image in row.images], sum(len(image.crops) for image in row.images)

    def holds(bucket: Bucket) -> bool:
        fit = all(n <= most for n, most in zip(tokens, bucket.images, strict=False))
        return text <= bucket.text and len(tokens) <= len(bucket.images) and fit and crops <= bucket.crops

    found = [bucket for bucket in buckets if holds(bucket)]
    if found:
        return min(found, key=lambda bucket: (bucket.slots, bucket.crops))
    most_text, most_images = max(b.text for b in buckets), max(len(b.images) for b in buckets)
    if text > most_text:
        problem = f"{text} text tokens, but the buckets hold at most {most_text}"
    elif len(tokens) > most_images:
        problem = f"{len(tokens)} pictures, but the buckets hold {most_images or 'none'}"
    else:
        known = ", ".join(f"{b.text} + {list(b.images)} in {b.crops}" for b in buckets)
        problem = (
            f"{text} text tokens and pictures of {tokens} tokens in {crops} crops, which no bucket holds together "
            f"(text + pictures in crops: {known})"
        )
    raise UserError(f"the prompt has {problem}: shorten it, or make the engine with larger buckets")


def image_bucket(text: int, rows: Sequence[Sequence[ImageSize]], config: LlavaConfig) -> Bucket:
    """The bucket of ``text`` slots for rows with images of these sizes."""
    found = [[level_of(size.crops, size.tokens, config, size.video) for size in row] for row in rows]
    columns = [[row[m] for row in found if m < len(row)] for m in range(max(map(len, rows), default=0))]
    largest = [(max(crops for crops, _ in column), max(tokens for _, tokens in column)) for column in columns]
    return bucket_of(text, largest, config)


def bucket_of(text: int, images: Sequence[tuple[int, int]], config: LlavaConfig) -> Bucket:
    """The bucket of ``text`` slots and images of (crops, tokens) each; their number is rounded up to 0, 1, 2, 4, …."""
    filler = levels(config)[0] if any(tokens for _, tokens in images) else (1, 0)
    images = [*images, *[filler] * (power_of_two(len(images)) - len(images))]
    return Bucket(text, tuple(tokens for _, tokens in images), sum(crops for crops, _ in images))


def bucket_for(text: int, images: Sequence[int], config: LlavaConfig) -> Bucket:
    """The bucket of ``text`` slots and images of so many tokens, with the crops that images of that size have.

    Raises:
      UserError: the model has no image of so many tokens.
    """
    if config.tiling or not isinstance(config.vision, VisionConfig):
        crops = sum(level_of(1, tokens, config)[0] for tokens in images)
    else:
        crops = -(-sum(images) // config.image_tokens)
    return Bucket(text, tuple(images), crops)


def level_of(crops: int, tokens: int, config: LlavaConfig, video: bool = False) -> tuple[int, int]:
    """The smallest of ``anyres.levels`` that holds an image; for a video the frames rounded up to a power of two.

    Raises:
      UserError: the image is larger than any level.
    """
    if not tokens:  # standby tokens alone
        return power_of_two(crops), 0
    if video and isinstance(config.vision, VisionConfig):
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


def power_of_two(n: int) -> int:
    """``n`` rounded up to 1, 2, 4, 8, …; 0 stays 0."""
    return 1 << (n - 1).bit_length() if n else 0
