"""Where an image's tokens lie on the picture: grids of patches, and which of them are kept or how they score."""

import dataclasses

import numpy as np
from PIL import Image

from pdrop_jax.config import LlavaConfig
from pdrop_jax.inputs.anyres import ImageTokens, grid_shape
from pdrop_jax.inputs.processor import Processor

TOKEN = 28  # pixels a side that a token of a picture of any size is shown with


@dataclasses.dataclass(frozen=True)
class View:
    """A picture as its tokens see it, in a grid of patches: the whole picture, or its tiles.

    n tokens of T features each.

    Attributes:
      picture: RGB; the grid covers it entirely.
      grid: rows and columns of patches.
      cell: (n, T) int, where a feature lies, counted through the grid row by row.
      here: (n, T) bool, whether it lies on this grid at all.
    """

    picture: Image.Image
    grid: tuple[int, int]
    cell: np.ndarray
    here: np.ndarray

    def covered(self, tokens: np.ndarray) -> tuple[np.ndarray, int]:
        """The mask (rows, columns) of the patches that ``tokens`` cover, and the number of tokens that cover any."""
        mask = np.zeros(self.grid, bool)
        mask.flat[self.cell[tokens][self.here[tokens]]] = True
        return mask, int(self.here[tokens].any(1).sum())

    def hottest(self, scores: np.ndarray) -> np.ndarray:
        """For each patch the largest score of the tokens on it, from scores (n,); NaN if there is none."""
        heat = np.full(self.grid, np.nan, np.float32)
        tokens, taps = np.nonzero(self.here)
        np.fmax.at(heat.reshape(-1), self.cell[tokens, taps], scores[tokens])
        return heat


def views_of(picture: Image.Image, image: ImageTokens, processor: Processor) -> list[View]:
    """The views of ``picture``, whose tokens are ``image``: the whole picture, and its tiles if it has any."""
    if image.positions is not None:  # one grid of tokens, as large as the picture is resized to
        _, rows, columns = image.positions.max(0) + 1
        cell = image.positions[:, 1:2] * columns + image.positions[:, 2:]
        seen = picture.resize((columns * TOKEN, rows * TOKEN), Image.Resampling.BICUBIC)
        return [View(seen, (int(rows), int(columns)), cell, np.ones((len(cell), 1), bool))]
    found = []
    for first, rows, columns in _panels(picture, image, processor.config):
        crops = image.crops[first : first + rows * columns]
        seen = as_seen(crops.reshape(rows, columns, *crops.shape[1:]), processor)
        found.append(View(seen, *_cells(image.index, first, rows, columns, processor.config)))
    return found


def _panels(picture: Image.Image, image: ImageTokens, config: LlavaConfig) -> list[tuple[int, int, int]]:
    """(first crop, rows, columns) of the parts of an image that are shown: the whole image, and its tiles."""
    if image.grid:
        rows, columns = image.grid
        tiles = [(0, rows, columns)] if rows * columns > 1 else []
        return [(len(image.crops) - 1, 1, 1), *tiles]
    if config.tiling is None or len(image.crops) == 1:
        return [(0, 1, 1)]
    return [(0, 1, 1), (1, *grid_shape((picture.height, picture.width), config.tiling, config.crop_tower.image_size))]


def _cells(
    index: np.ndarray, first: int, rows: int, columns: int, config: LlavaConfig
) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """Grid, cells and presence of a ``View`` of crops ``first`` on, laid out as (rows, columns), from ``index``."""
    side, features = config.crop_tower.features_a_side, config.image_tokens
    patch = index % features - (features - side**2)  # a class token, where it is kept, covers no part of the picture
    crop = index // features - first
    here = (index >= 0) & (patch >= 0) & (crop >= 0) & (crop < rows * columns)
    y = crop // columns * side + patch // side
    x = crop % columns * side + patch % side
    return (rows * side, columns * side), y * columns * side + x, here


def as_seen(crops: np.ndarray, processor: Processor) -> Image.Image:
    """Joins normalised crops (rows, columns, h, w, 3) into the image that their tokens cover."""
    settings = processor.image_processor
    if settings.do_normalize:
        crops = crops * np.array(settings.image_std) + np.array(settings.image_mean)
    scale = 1 / settings.rescale_factor if settings.do_rescale else 1.0
    rows, columns, h, w, _ = crops.shape
    pixels = crops.swapaxes(1, 2).reshape(rows * h, columns * w, 3) * scale
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
