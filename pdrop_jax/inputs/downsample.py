"""Pictures with fewer tokens: what dropping tokens has to be compared with."""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageSize, ImageTokens
from pdrop_jax.inputs.families import FAMILIES
from pdrop_jax.inputs.images import ImageProcessor, Picture, as_tokens, measure, measure_size, picture_size

STEPS = 20  # of a bisection: the scale of a picture to a millionth
SCALES = 16  # at which pictures are tried that are cut into tiles


def downsampled(
    image: Image.Image,
    tokens_of: Callable[[int], int],
    processor: ImageProcessor,
    config: LlavaConfig,
    *,
    alone: bool = True,
) -> ImageTokens:
    """An RGB image with about ``tokens_of(n)`` tokens in place of n: never more, unless pictures are cut into tiles.

    Models that take pictures of any size get a smaller picture. Models that cut pictures into tiles get fewer tiles, so
    that the number of tokens is the nearest that there is, which may be more. Others have a grid of as many features
    for every picture: they get the means of the features over the cells of a coarser grid, behind the projector.

    Args:
      tokens_of: at least 1, at most n.
      alone: whether its row has no other image.
    """
    if config.text.mrope_sections:
        return as_tokens(_smaller(image, tokens_of, processor, config), processor, config)
    if cuts_tiles(config):
        size, processor = _fewer_tiles(image.size[::-1], tokens_of, processor, config, alone)
        if size != image.size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        return as_tokens(image, processor, config, alone=alone)
    whole = as_tokens(image, processor, config)
    index, weight = averages(config, tokens_of(len(whole)))
    return dataclasses.replace(whole, index=index, weight=weight)


def measure_downsampled(
    picture: Picture, tokens_of: Callable[[int], int], processor: ImageProcessor, config: LlavaConfig, *, alone: bool
) -> ImageSize:
    """Space for what ``downsampled`` makes of an image. At most the header of a file is read."""
    if not cuts_tiles(config):
        return measure(picture, processor, config, alone=alone)
    size, processor = _fewer_tiles(picture_size(picture), tokens_of, processor, config, alone)
    return measure_size(lambda: size, processor, config, alone=alone)


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


def cuts_tiles(config: LlavaConfig) -> bool:
    """Whether ``downsampled`` gives a picture fewer tiles, so that it takes less space than the picture."""
    family = FAMILIES.get(config.family)
    return not config.text.mrope_sections and (config.tiling is not None or bool(family and family.measure))


def _fewer_tiles(
    size: tuple[int, int], tokens_of: Callable[[int], int], processor: ImageProcessor, config: LlavaConfig, alone: bool
) -> tuple[tuple[int, int], ImageProcessor]:
    """The size (height, width) and the processor by which a picture has nearest to ``tokens_of(n)`` tokens.

    LLaVA's tiles follow from the size of a picture. The families' processors enlarge small pictures to their tiles, so
    these are given a smaller bound on the number of tiles.
    """

    @functools.cache
    def tokens(n: int) -> int:
        return measure_size(lambda: ways[n][0], ways[n][1], config, alone=alone).tokens

    family = FAMILIES.get(config.family)
    ways = [(size, processor)]
    if family:
        ways += [(size, coarser) for coarser in family.coarser(processor, config)]
    else:
        scales = (n / SCALES for n in range(SCALES - 1, 0, -1))
        ways += [((max(1, round(size[0] * x)), max(1, round(size[1] * x))), processor) for x in scales]
    wanted = tokens_of(tokens(0))

    def distance(n: int) -> float:
        try:
            return abs(tokens(n) - wanted)
        except UserError:  # so small that nothing of it would be left in its tiles
            return math.inf

    return ways[min(range(len(ways)), key=distance)]  # the largest of those that are equally near


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
