"""Images as slices of the grid nearest in aspect, beside a thumbnail (LLaVA-UHD).

LLaVA-UHD gives each slice a grid of patches of its own aspect. Here the image is stretched to whole squares of the
tower, as InternVL does: all views of a batch are then of one shape, and one call of the tower takes them all, each
with attention of its own.
"""

import math
from typing import Any

import numpy as np
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pdrop_jax.config import Tiling


def aspect_grid(size: tuple[int, int], tiling: Tiling, tile: int) -> tuple[int, int]:
    """LLaVA-UHD's grid (arXiv 2403.11703, section 3.1) for an image of ``size`` (height, width): (rows, columns).

    An image of N = ceil(area / area of a tile) tiles is cut into N - 1, N or N + 1 slices: into the grid among
    ``tiling.pinpoints`` whose aspect is the nearest to the image's, by the logarithm. (0, 0) if N is 1. LLaVA-UHD v4
    says "best-grid" and prints no formula.
    """
    height, width = size
    grids = [(h // tile, w // tile) for h, w in tiling.pinpoints]
    wanted = min(math.ceil(height * width / tile**2), max(map(math.prod, grids)))
    near = [grid for grid in grids if abs(math.prod(grid) - wanted) <= 1]
    if wanted == 1 or not near:
        return 0, 0
    # Rounded, so that the two ways to miss an aspect by the same factor are equally good: then the first one is taken.
    return min(near, key=lambda grid: round(abs(math.log(width / height) - math.log(grid[1] / grid[0])), 9))


def sliced(image: Image.Image, processor: Any, tile: int, grid: tuple[int, int]) -> np.ndarray:
    """The thumbnail of an RGB image and its slices, (1 + rows * columns, tile, tile, 3) float32, normalised.

    Args:
      processor: whose resampling and normalisation are used.
      tile: pixels a side.
      grid: (rows, columns) of slices; (0, 0) makes the thumbnail alone.
    """
    names = ["resample", "rescale_factor", "image_mean", "image_std"]
    settings = {name: getattr(processor, name) for name in names}

    def stretched(height: int, width: int) -> np.ndarray:
        resize = SiglipImageProcessorPil(size={"height": height, "width": width}, **settings)
        pixels: Any = resize(image, return_tensors="np")["pixel_values"][0]
        return np.asarray(pixels, np.float32).transpose(1, 2, 0)

    rows, columns = grid
    views = stretched(tile, tile)[None]
    if not rows:
        return views
    slices = stretched(rows * tile, columns * tile).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    return np.concatenate([views, slices.reshape(rows * columns, tile, tile, 3)])
