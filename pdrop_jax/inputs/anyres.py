"""Pictures of any size as tiles (LLaVA-NeXT's anyres), and which features become which tokens.

A picture is resized into the best of some resolutions, cut into tiles of the vision tower's size, and seen once more as
a whole. Its tokens are the features of the whole, then those of the tiles row by row over the picture, without the bars
that made it fit, a newline vector behind every row. All of that is one table of indices, made here: numpy only.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from pdrop_jax.config import LlavaConfig, Tiling
from pdrop_jax.errors import UserError

NEWLINE = -1  # in a table: the newline vector
SHRINK_FROM = 1.1  # times as high and wide as Tiling.max_tiles allows


class ImageSize(NamedTuple):
    """What an image takes of a batch: crops and tokens, and whether its crops are the frames of a video."""

    crops: int
    tokens: int
    video: bool = False


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """A picture, or a video, as crops and the tokens that are made of their features.

    n tokens of T features each, P crops.

    Attributes:
      crops: (P, h, w, 3) float32, normalised.
      index: (n, T) int32, features counted over all crops, or NEWLINE. Of a video they are those that the model has
        for frames, if it has (``LlavaConfig.frame_tokens``).
      weight: (n, T) float32, how a token is blended of them; None if T is 1 and nothing is blended.
      video: whether its crops are the frames of a video.
    """

    crops: np.ndarray
    index: np.ndarray
    weight: np.ndarray | None = None
    video: bool = False

    def __len__(self) -> int:
        return len(self.index)

    @property
    def size(self) -> ImageSize:
        return ImageSize(len(self.crops), len(self.index), self.video)

    def widened(self, taps: int) -> tuple[np.ndarray, np.ndarray]:
        """``index`` and ``weight`` (n, ``taps``); what is not blended is one feature of weight 1."""
        if self.weight is not None:
            return self.index, self.weight
        weight = np.zeros((len(self), taps), np.float32)
        weight[:, 0] = 1
        return np.repeat(self.index, taps, axis=1), weight


def whole(crop: np.ndarray, config: LlavaConfig) -> ImageTokens:
    """A picture that is one crop (h, w, 3): its tokens are its features, and a newline vector if there is one."""
    index = np.arange(config.image_tokens, dtype=np.int32)
    return ImageTokens(crop[None], np.append(index, np.int32(NEWLINE))[:, None] if config.tiling else index[:, None])


def pooled(crops: np.ndarray, config: LlavaConfig) -> ImageTokens:
    """The frames ``crops`` (F, h, w, 3) of a video as one image, each frame's features shrunk to half a side.

    576 features become the 144 of LLaVA-NeXT-Video, means of four, and 729 OneVision's 196. A OneVision has its newline
    vector behind them. What the model itself averages before the projector is taken as it is.
    """
    if config.frame_tokens:
        return ImageTokens(crops, np.arange(len(crops) * config.frame_tokens, dtype=np.int32)[:, None], video=True)
    side = config.vision.patches_a_side
    features = np.arange(side**2, dtype=np.int32) + config.image_tokens - side**2  # without a class token
    index, weight = (x.reshape(-1, 4) for x in bilinear(features.reshape(side, side), -(-side // 2), -(-side // 2)))
    index = (index + np.arange(len(crops), dtype=np.int32)[:, None, None] * config.image_tokens).reshape(-1, 4)
    weight = np.tile(weight, (len(crops), 1))
    if config.tiling and config.tiling.max_tiles:
        index = np.append(index, np.full((1, 4), NEWLINE, np.int32), axis=0)
        weight = np.append(weight, np.full((1, 4), 0.25, np.float32), axis=0)
    return ImageTokens(crops, index, weight, video=True)


def tiled(crops: np.ndarray, size: tuple[int, int], config: LlavaConfig) -> ImageTokens:
    """A picture of ``size`` (height, width) pixels, its whole and its tiles as ``crops`` (P, h, w, 3).

    Raises:
      UserError: so narrow that nothing is left of it between its bars.
    """
    assert config.tiling
    return ImageTokens(crops, *token_table(size, config.tiling, config.vision.image_size, config.vision.patches_a_side))


def token_table(size: tuple[int, int], tiling: Tiling, tile: int, side: int) -> tuple[np.ndarray, np.ndarray | None]:
    """``index`` and ``weight`` of the tokens of a picture.

    Example, ``side`` 2 and two tiles side by side of which no bar is cut::

        tiles    4 5 | 8  9        tokens   0 1 2 3   4 5 8  9 -1   6 7 10 11 -1
                 6 7 | 10 11                (whole)   (first row)   (second row)

    Args:
      size: (height, width) pixels.
      tile: pixels of a tile's side.
      side: features of a tile's side.
    """
    rows, columns = grid_shape(size, tiling, tile)
    features = np.arange(side**2, (1 + rows * columns) * side**2, dtype=np.int32)
    grid = features.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
    features = grid[unpadded(size, (rows * side, columns * side), tiling)]
    if not features.size:
        raise _too_narrow(size)
    base = np.arange(side**2, dtype=np.int32)
    scale = math.sqrt(features.size / (tiling.max_tiles * side**2)) if tiling.max_tiles else 1.0
    if scale <= SHRINK_FROM:
        lines = np.pad(features, [(0, 0), (0, 1)], constant_values=NEWLINE)
        return np.concatenate([base, lines.ravel()])[:, None], None
    height, width = (int(n // scale) for n in features.shape)
    index, weight = bilinear(features, height, width)
    index = np.pad(index, [(0, 0), (0, 1), (0, 0)], constant_values=NEWLINE).reshape(-1, 4)
    weight = np.pad(weight, [(0, 0), (0, 1), (0, 0)], constant_values=0.25).reshape(-1, 4)
    base = np.repeat(base[:, None], 4, axis=1)
    return np.concatenate([base, index]), np.concatenate([np.full(base.shape, 0.25, np.float32), weight])


def grid_shape(size: tuple[int, int], tiling: Tiling, tile: int) -> tuple[int, int]:
    """(rows, columns) of tiles of a picture of ``size`` (height, width)."""
    found = select_best_resolution(size, [list(point) for point in tiling.pinpoints])
    if found is None:
        raise _too_narrow(size)
    height, width = found
    return height // tile, width // tile


def _too_narrow(size: tuple[int, int]) -> UserError:
    return UserError(f"a picture of {size[1]}x{size[0]} pixels is too narrow: nothing of it would be left in its tiles")


def unpadded(size: tuple[int, int], features: tuple[int, int], tiling: Tiling) -> tuple[slice, slice]:
    """The rows and columns of ``features`` (height, width) that a picture of ``size`` covers, without its bars."""
    height, width = size
    rows, columns = features

    def inside(length: float, whole: int) -> slice:
        # The original code truncates; Hugging Face's first rounds away what floating point adds or takes.
        covered = int(round(length, 7) if tiling.rounded else length)
        bar = (whole - covered) // 2
        return slice(bar, whole - bar)

    if width / height > columns / rows:
        return inside(height * (columns / width), rows), slice(0, columns)
    return slice(0, rows), inside(width * (rows / height), columns)


def bilinear(features: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Four neighbours (height, width, 4) and their weights for a grid resized as torch's bilinear interpolation does.

    Pixel centres keep their place (``align_corners=False``), nothing is smoothed.
    """

    def axis(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5, 0)
        low = np.minimum(at.astype(np.int64), old - 1)
        share = (at - low).astype(np.float32)
        return np.stack([low, np.minimum(low + 1, old - 1)], axis=-1), np.stack([1 - share, share], axis=-1)

    (y, y_share), (x, x_share) = axis(features.shape[0], height), axis(features.shape[1], width)
    index = features[y[:, None, :, None], x[None, :, None, :]]
    weight = y_share[:, None, :, None] * x_share[None, :, None, :]
    return index.reshape(height, width, 4), weight.reshape(height, width, 4)


@functools.lru_cache(4096)  # a data set has few sizes among many pictures
def levels(config: LlavaConfig) -> list[tuple[int, int]]:
    """The sizes that an image of a bucket can have, ascending: (crops, tokens).

    The whole alone, then with 1, 2, 4, 8, … tiles, up to the most that the model's resolutions have: few shapes to
    compile.
    """
    tiling, tile, side = config.tiling, config.vision.image_size, config.vision.patches_a_side
    alone = (1, config.image_tokens + (tiling is not None))
    if tiling is None:
        return [alone]
    grids = [(height // tile, width // tile) for height, width in tiling.pinpoints]
    most = max(rows * columns for rows, columns in grids)
    sizes = [min(1 << n, most) for n in range((most - 1).bit_length() + 1)]

    def tokens(rows: int, columns: int) -> int:
        cells = rows * columns * side**2
        if tiling.max_tiles:
            cells = min(cells, int(SHRINK_FROM**2 * tiling.max_tiles * side**2))
        return side**2 + cells + rows * side

    found = {n: [tokens(*grid) for grid in grids if math.prod(grid) <= n] for n in sizes}
    return [alone, *((1 + n, max(sizes)) for n, sizes in found.items() if sizes)]


@functools.lru_cache(4096)  # a data set has few sizes among many pictures
def count(size: tuple[int, int], config: LlavaConfig) -> tuple[int, int]:
    """(crops, tokens) of an image of ``size`` (height, width) pixels.

    Raises:
      UserError: the image is too narrow to be tiled.
    """
    if config.tiling is None:
        return levels(config)[0]
    tile = config.vision.image_size
    rows, columns = grid_shape(size, config.tiling, tile)
    return 1 + rows * columns, len(token_table(size, config.tiling, tile, config.vision.patches_a_side)[0])
