"""Images of any size as tiles (LLaVA-NeXT's anyres, LLaVA-UHD's slices), and the mapping from features to tokens.

An image is resized and padded to the best of several resolutions and cut into tiles of the vision tower's size. The
whole image, resized to one tile, is added as an overview. Its tokens are the features of the overview, then those of
the tiles row by row across the image without the padding, with a newline vector after each row. One table of indices,
computed here with numpy, describes all of that.

Slices (``slices``) are tiles of the grid nearest in aspect, to which the image is stretched, so that nothing is padded;
an image of about one tile has no slices, only the overview.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from pdrop_jax.config import LlavaConfig, Tiling
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.slices import aspect_grid

NEWLINE = -1  # table entry for the newline vector
SHRINK_FROM = 1.1  # downsampled if over this factor taller and wider than Tiling.max_tiles allows


class ImageSize(NamedTuple):
    """The space that an image needs in a batch: crops and tokens, and whether the crops are frames of a video.

    Standby tokens do not count: they take slots of text. ``texts`` stand around its parts: in front of each of them,
    and behind the last. They are empty for an image in one part without captions.
    """

    crops: int
    tokens: int
    video: bool = False
    texts: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        """Placeholders that stand for the image."""
        return max(1, len(self.texts) - 1)


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """An image or a video: its crops, and how its tokens are formed from their features.

    n tokens of T features each, P crops.

    Attributes:
      crops: (P, h, w, 3) float32, normalised.
      index: (n, T) int32, feature indices over all crops, or NEWLINE. For a video they index the frame features if the
        model has those (``LlavaConfig.frame_tokens``).
      weight: (n, T) float32, the weights by which features are blended into a token; None if T is 1.
      video: whether the crops are the frames of a video.
      layout: (P, U, 3 or 5) int32, for windows of patches (``families.qwen2_vl.inputs``), whose crops are (P, U, F):
        row and column of a patch, and its frame from 1 on; 0 for an empty place. With learned positions also the
        picture's rows and columns of patches. None for square crops.
      positions: (n, 3) int32, time, row and column of each token for M-RoPE, counted from the image's first; else None.
      extent: positions that the image, or each of its parts, takes in its row of tokens.
      captions: if the image stands in the text in several parts of as many tokens, the text in front of each part: the
        timestamps of a video (Qwen3-VL), what precedes a picture with crops, or one of them (Gemma 3), and the places
        of tiles (SmolVLM). Otherwise empty.
      ending: text behind the last of these parts.
      grid: rows and columns of the tiles that the crops begin with, if the model tiles in a way of its own.
      standby: the last so many tokens are standby tokens, which no drop ranks; they index those of all crops.
      is_crop: whether the image is cut from one before it in its row, in whose place in the messages it stands too.
    """

    crops: np.ndarray
    index: np.ndarray
    weight: np.ndarray | None = None
    video: bool = False
    layout: np.ndarray | None = None
    positions: np.ndarray | None = None
    extent: int = 0
    captions: tuple[str, ...] = ()
    ending: str = ""
    grid: tuple[int, int] | None = None
    is_crop: bool = False
    standby: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def size(self) -> ImageSize:
        texts = (*self.captions, self.ending) if self.captions else ()
        return ImageSize(len(self.crops), len(self.index) - self.standby, self.video, texts)

    @property
    def parts(self) -> int:
        """Placeholders that stand for the image."""
        return max(1, len(self.captions))

    def widened(self, taps: int) -> tuple[np.ndarray, np.ndarray]:
        """``index`` and ``weight`` as (n, ``taps``), those that are added with weight 0.

        A token that is not blended has one feature of weight 1.
        """
        weight = np.eye(1, self.index.shape[1], dtype=np.float32) if self.weight is None else self.weight
        padded = np.zeros((len(self), taps), np.float32)
        padded[:, : weight.shape[1]] = weight
        return np.pad(self.index, [(0, 0), (0, taps - self.index.shape[1])], mode="edge"), padded


def captions_of(images: Iterable[ImageTokens]) -> list[tuple[str, ...]]:
    """``ImageSize.texts`` at each place that an image has in the messages, with those of its crops."""
    found: list[tuple[str, ...]] = []
    for image in images:
        found.append((*found.pop()[:-1], *image.size.texts) if image.is_crop else image.size.texts)
    return found


def whole(crop: np.ndarray, config: LlavaConfig) -> ImageTokens:
    """An image as one crop (h, w, 3). Its tokens are its features, plus a newline vector if the model has one."""
    index = np.arange(config.image_tokens, dtype=np.int32)
    return ImageTokens(crop[None], np.append(index, np.int32(NEWLINE))[:, None] if config.tiling else index[:, None])


def pooled(crops: np.ndarray, config: LlavaConfig) -> ImageTokens:
    """The frames ``crops`` (F, h, w, 3) of a video as one image, with features downsampled to half the side length.

    576 features per frame become 144 (LLaVA-NeXT-Video, means of four) and 729 become 196 (OneVision, which also adds a
    newline vector at the end). Features that the model itself pools before the projector are used unchanged.
    """
    if config.frame_tokens:
        return ImageTokens(crops, np.arange(len(crops) * config.frame_tokens, dtype=np.int32)[:, None], video=True)
    side = config.crop_tower.features_a_side
    features = np.arange(side**2, dtype=np.int32) + config.image_tokens - side**2  # without a class token
    index, weight = (x.reshape(-1, 4) for x in bilinear(features.reshape(side, side), -(-side // 2), -(-side // 2)))
    index = (index + np.arange(len(crops), dtype=np.int32)[:, None, None] * config.image_tokens).reshape(-1, 4)
    weight = np.tile(weight, (len(crops), 1))
    if config.tiling and config.tiling.max_tiles:
        index = np.append(index, np.full((1, 4), NEWLINE, np.int32), axis=0)
        weight = np.append(weight, np.full((1, 4), 0.25, np.float32), axis=0)
    return ImageTokens(crops, index, weight, video=True)


def tiled(crops: np.ndarray, size: tuple[int, int], config: LlavaConfig) -> ImageTokens:
    """An image of ``size`` (height, width) pixels; ``crops`` (P, h, w, 3) are its overview and its tiles.

    Raises:
      UserError: the image is so narrow that nothing of it is left once the padding is removed.
    """
    assert config.tiling
    vision = config.crop_tower
    return ImageTokens(crops, *token_table(size, config.tiling, vision.image_size, vision.features_a_side))


def token_table(size: tuple[int, int], tiling: Tiling, tile: int, side: int) -> tuple[np.ndarray, np.ndarray | None]:
    """``index`` and ``weight`` of the tokens of an image.

    Example: ``side`` 2 and two tiles side by side without padding::

        tiles    4 5 | 8  9        tokens   0 1 2 3   4 5 8  9 -1   6 7 10 11 -1
                 6 7 | 10 11                (overview) (first row)  (second row)

    Args:
      size: (height, width) pixels.
      tile: side length of a tile in pixels.
      side: side length of a tile in features.
    """
    rows, columns = grid_shape(size, tiling, tile)
    base = np.arange(side**2, dtype=np.int32)
    if not rows:
        return np.append(base, np.int32(NEWLINE))[:, None], None
    features = np.arange(side**2, (1 + rows * columns) * side**2, dtype=np.int32)
    grid = features.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
    features = grid[unpadded(size, (rows * side, columns * side), tiling)]
    if not features.size:
        raise _too_narrow(size)
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
    """(rows, columns) of tiles for an image of ``size`` (height, width); (0, 0) if it is not cut into slices."""
    if tiling.choice == "aspect":
        return aspect_grid(size, tiling, tile)
    found = select_best_resolution(size, [list(point) for point in tiling.pinpoints])
    if found is None:
        raise _too_narrow(size)
    height, width = found
    return height // tile, width // tile


def _too_narrow(size: tuple[int, int]) -> UserError:
    return UserError(f"a picture of {size[1]}x{size[0]} pixels is too narrow: nothing of it would be left in its tiles")


def unpadded(size: tuple[int, int], features: tuple[int, int], tiling: Tiling) -> tuple[slice, slice]:
    """The rows and columns of ``features`` (height, width) that an image of ``size`` covers, without the padding."""
    height, width = size
    rows, columns = features
    if tiling.choice == "aspect":
        return slice(0, rows), slice(0, columns)

    def inside(length: float, whole: int) -> slice:
        # The original code truncates; Hugging Face's first rounds away floating-point error.
        covered = int(round(length, 7) if tiling.rounded else length)
        bar = (whole - covered) // 2
        return slice(bar, whole - bar)

    if width / height > columns / rows:
        return inside(height * (columns / width), rows), slice(0, columns)
    return slice(0, rows), inside(width * (rows / height), columns)


def bilinear(features: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Four neighbours (height, width, 4) and their weights, as in torch's bilinear interpolation of ``features``.

    With ``align_corners=False`` and without antialiasing.
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
    """The sizes that an image in a bucket can have, ascending: (crops, tokens).

    The overview alone, then with 1, 2, 4, 8, … tiles up to the largest of the model's resolutions, so that few shapes
    are compiled. Without LLaVA's tiling, they are the levels of the tower.
    """
    tiling = config.tiling
    if tiling is None:
        return [(crops, n + config.keep_class_token) for crops, n in config.vision.levels(config.text.max_length)]
    tile, side = config.crop_tower.image_size, config.crop_tower.features_a_side
    alone = (1, config.image_tokens + 1)
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


def largest_picture(config: LlavaConfig) -> int:
    """Tokens of the largest picture of a model whose tower takes crops, as its released processor makes it."""
    return config.crop_tower.largest_picture or levels(config)[-1][1]


@functools.lru_cache(4096)  # a data set has few sizes among many pictures
def count(size: tuple[int, int], config: LlavaConfig) -> tuple[int, int]:
    """(crops, tokens) of an image of ``size`` (height, width) pixels.

    Raises:
      UserError: the image is too narrow to be tiled.
    """
    if config.tiling is None:
        return levels(config)[0]
    tile = config.crop_tower.image_size
    rows, columns = grid_shape(size, config.tiling, tile)
    return 1 + rows * columns, len(token_table(size, config.tiling, tile, config.crop_tower.features_a_side)[0])
