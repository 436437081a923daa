"""LLaVA-UHD's slices: the grid, the pixels, and how many crops and tokens they are."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pdrop_jax.config import EarlyCompression, LlavaConfig, Tiling, VisionConfig
from pdrop_jax.inputs.anyres import NEWLINE, count, grid_shape, levels, token_table
from pdrop_jax.inputs.images import as_tokens, load_image_processor, measure
from pdrop_jax.model.compression import with_compression

TILE = 28
SLICES = Tiling.slices(TILE)
CONFIG = LlavaConfig(vision=VisionConfig(TILE, 7), tiling=SLICES)
SIZES = st.tuples(st.integers(1, 400), st.integers(1, 400))


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (28, 28, (0, 0)),  # one tile: no slices
        (27, 29, (0, 0)),
        (56, 28, (1, 2)),
        (28, 84, (3, 1)),
        (60, 60, (2, 2)),  # N is 5: of 4, 5 and 6 slices the square grid
        (400, 300, (3, 3)),  # N is 154, at most 9
        (400, 28, (1, 9)),
        (100, 60, (2, 4)),  # N is 8 and the aspect 1.67: nearer to 2 than to the 1 of nine slices
    ],
)
def test_grids(width, height, grid):
    assert grid_shape((height, width), SLICES, TILE) == grid


@given(SIZES)
def test_no_grid_of_about_as_many_slices_is_nearer_in_aspect(size):
    height, width = size
    wanted = min(math.ceil(height * width / TILE**2), 9)
    rows, columns = grid_shape(size, SLICES, TILE)
    if wanted == 1:
        assert (rows, columns) == (0, 0)
        return
    assert abs(rows * columns - wanted) <= 1
    assert 2 <= rows * columns <= 9

    def missed(grid):
        return abs(math.log(width / height) - math.log(grid[1] / grid[0]))

    for grid in itertools.product(range(1, 10), repeat=2):
        if 2 <= math.prod(grid) <= 9 and abs(math.prod(grid) - wanted) <= 1:
            assert missed((rows, columns)) <= missed(grid) + 1e-8


def test_pixels_of_the_thumbnail_and_of_each_slice(tmp_path):
    """A picture of four colours, one for each slice."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
    image = Image.fromarray(colours.repeat(30, axis=0).repeat(30, axis=1))
    processor = load_image_processor(tmp_path, CONFIG)
    found = as_tokens(image, processor, CONFIG)
    assert found.crops.shape == (5, TILE, TILE, 3)
    pixels = found.crops * np.array(processor.image_std) + np.array(processor.image_mean)
    middle = slice(8, 20)
    for n, colour in enumerate(colours.reshape(4, 3)):
        np.testing.assert_allclose(pixels[1 + n, middle, middle].mean((0, 1)), colour / 255, atol=0.02)
    np.testing.assert_allclose(pixels[0, 5, 22], [0, 1, 0], atol=0.05)  # the green quarter of the whole


def test_tokens_are_those_of_the_compressed_grid(tmp_path):
    """4 x 4 patches a view -> 2 x 2 -> one token; lines of slices end with the newline vector."""
    config = with_compression(CONFIG, EarlyCompression())
    processor = load_image_processor(tmp_path, config)
    assert (config.image_tokens, levels(config)[:2]) == (1, [(1, 2), (3, 5)])
    image = Image.new("RGB", (100, 60))
    found = as_tokens(image, processor, config)
    assert found.index[:, 0].tolist() == [0, 1, 2, 3, 4, NEWLINE, 5, 6, 7, 8, NEWLINE]
    assert (found.size.crops, found.size.tokens) == count((60, 100), config) == (9, 11)
    assert measure(np.asarray(image), processor, config, alone=True) == found.size
    alone = as_tokens(Image.new("RGB", (20, 30)), processor, config)
    assert alone.index[:, 0].tolist() == [0, NEWLINE]
    assert count((30, 20), config) == (1, 2)
    assert token_table((30, 20), SLICES, TILE, 1)[1] is None
