"""Pictures with fewer tokens: what dropping tokens has to be compared with."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from pdrop_jax.config import LlavaConfig
from pdrop_jax.inputs.anyres import ImageTokens
from pdrop_jax.inputs.families import FAMILIES
from pdrop_jax.inputs.images import ImageProcessor, as_tokens, measure_size

STEPS = 20  # of a bisection: the scale of a picture to a millionth


def can_downsample(config: LlavaConfig) -> bool:
    """Whether ``downsampled`` works for a model: it does not if pictures are cut into tiles."""
    family = FAMILIES.get(config.family)
    return bool(config.text.mrope_sections) or (config.tiling is None and (family is None or family.measure is None))


def downsampled(
    image: Image.Image, tokens_of: Callable[[int], int], processor: ImageProcessor, config: LlavaConfig
) -> ImageTokens:
    """An RGB image with ``tokens_of(n)`` tokens, or a few less, in place of the n that it has.

    Models that take pictures of any size get a smaller picture. Others have a grid of as many features for every
    picture: they get the means of the features over the cells of a coarser grid, behind the projector.

    Args:
      tokens_of: at least 1, at most n.
    """
    if config.text.mrope_sections:
        return as_tokens(_smaller(image, tokens_of, processor, config), processor, config)
    whole = as_tokens(image, processor, config)
    index, weight = averages(config, tokens_of(len(whole)))
    return dataclasses.replace(whole, index=index, weight=weight)


def averages(config: LlavaConfig, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """``ImageTokens.index`` and ``weight`` of up to ``tokens`` means over equal cells of a picture's features.

    Example, 4 x 4 features as 6 tokens, 2 rows of 3: the first token is the mean of features 0, 4, and a third each of
    1 and 5. A class token, if the model has one, stays as it is.
    """
    side = config.crop_tower.features_a_side
    extra = config.image_tokens - side**2
    rows = max(1, min(side, math.isqrt(max(tokens - extra, 1))))
    columns = max(1, min(side, (tokens - extra) // rows))
    (y, y_share), (x, x_share) = _cells(side, rows), _cells(side, columns)
    index = (y[:, None, :, None] * side + x[None, :, None, :]).reshape(rows * columns, -1) + extra
    weight = (y_share[:, None, :, None] * x_share[None, :, None, :]).reshape(rows * columns, -1)
    kept = np.zeros((extra, index.shape[1]))
    kept[:, :1] = 1
    return (
        np.concatenate([np.repeat(np.arange(extra)[:, None], index.shape[1], axis=1), index]).astype(np.int32),
        np.concatenate([kept, weight]).astype(np.float32),
    )


def _cells(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The features (new, T) that each of ``new`` equal cells of ``old`` features covers, and their shares of it."""
    edges = np.arange(new + 1) * (old / new)
    shares = np.minimum(np.arange(old) + 1, edges[1:, None]) - np.maximum(np.arange(old), edges[:-1, None])
    shares = np.where(shares > 1e-9, shares, 0) * (new / old)
    taps = int((shares > 0).sum(1).max())
    index = np.minimum((shares > 0).argmax(1)[:, None] + np.arange(taps), old - 1)
    weight = np.where(np.diff(index, axis=1, prepend=-1) > 0, np.take_along_axis(shares, index, axis=1), 0)
    return index, weight


def _smaller(
    image: Image.Image, tokens_of: Callable[[int], int], processor: ImageProcessor, config: LlavaConfig
) -> Image.Image:
    """The largest picture of the same shape that has up to ``tokens_of(n)`` tokens, or the smallest that there is."""

    def tokens(size: tuple[int, int]) -> int:
        return measure_size(lambda: size[::-1], processor, config, alone=True).tokens

    def scaled(scale: float) -> tuple[int, int]:
        return max(1, round(image.width * scale)), max(1, round(image.height * scale))

    most = tokens_of(tokens(image.size))
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens(scaled(middle)) <= most else (low, middle)
    return image.resize(scaled(low), Image.Resampling.BICUBIC)
