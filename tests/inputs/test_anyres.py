"""Tiling, compared with the recorded sizes, torch's interpolation and the unpadding in transformers."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import unpad_image

from pdrop_jax.config import LlavaConfig, Tiling, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import NEWLINE, bilinear, count, grid_shape, levels, pooled, token_table, unpadded, whole
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket, level_of
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.images import Video, as_tokens, frames_as_tokens, image_size, load_image_processor

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RECORDED = np.load(GOLDEN / "image_preprocess.npz")
PINPOINTS = json.loads((GOLDEN / "image_preprocess.json").read_text())["image_grid_pinpoints"]
NEXT = Tiling(tuple((height, width) for width, height in PINPOINTS))
TINY = LlavaConfig(vision=VisionConfig(image_size=28), tiling=Tiling.next(28))
SIZES = st.tuples(st.integers(1, 2000), st.integers(1, 2000))


def test_the_resolutions_of_llava_next():
    assert Tiling.next() == NEXT


@pytest.mark.parametrize("n", range(len(RECORDED["sizes_wh"])))
def test_recorded_sizes(n):
    width, height = RECORDED["sizes_wh"][n].tolist()
    rows, columns = grid_shape((height, width), NEXT, 336)
    assert [columns, rows] == RECORDED["grid_shape_wh"][n].tolist()
    assert [columns * 336, rows * 336] == RECORDED["best_resolution_wh"][n].tolist()
    covered = unpadded((height, width), (rows * 24, columns * 24), NEXT)
    assert [x.stop - x.start for x in covered] == RECORDED["unpadded_hw"][n].tolist()
    assert len(token_table((height, width), NEXT, 336, 24)[0]) == RECORDED["num_image_tokens_spatial_unpad"][n]


def test_two_tiles_side_by_side():
    """The example of ``token_table``."""
    index, weight = token_table((28, 56), Tiling(((28, 56),)), 28, 2)
    assert index[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]
    assert weight is None


@given(SIZES)
def test_bars_as_transformers_finds_them(size):
    """Hugging Face's rounding, compared with its own function. What remains after unpadding is contiguous."""
    import torch

    tiling = dataclasses.replace(NEXT, rounded=True)
    rows, columns = (24 * n for n in grid_shape(size, tiling, 336))
    grid = np.arange(rows * columns).reshape(rows, columns)
    theirs = unpad_image(torch.from_numpy(grid[None]), size)[0].numpy()
    np.testing.assert_array_equal(grid[unpadded(size, grid.shape, tiling)], theirs)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_bilinear_as_torch(rows, columns, height, width):
    import torch

    grid = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    index, weight = bilinear(np.arange(rows * columns).reshape(rows, columns), height, width)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(grid[None, None]), (height, width), mode="bilinear")
    np.testing.assert_allclose((grid.ravel()[index] * weight).sum(-1), theirs[0, 0].numpy(), atol=1e-5)


@given(SIZES)
def test_what_is_shrunk_is_no_larger_than_asked_for(size):
    points = tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7))
    tiling = Tiling(points, max_tiles=9, rounded=True)
    config = LlavaConfig(vision=VisionConfig(image_size=384, patch_size=14), tiling=tiling)
    crops, tokens = count(size, config)
    most_crops, most_tokens = level_of(crops, tokens, config)
    assert crops <= most_crops <= 2 * crops
    assert tokens <= most_tokens
    index, weight = token_table(size, tiling, 384, 27)
    assert index.max() < crops * 27**2
    if weight is not None:
        np.testing.assert_allclose(weight.sum(1), 1, atol=1e-6)
        lines = (index == NEWLINE).all(1).sum()
        assert len(index) - 27**2 - lines <= 9 * 27**2


def test_levels():
    assert levels(dataclasses.replace(TINY, tiling=None)) == [(1, 4)]
    assert levels(TINY) == [(1, 5), (3, 4 + 8 + 4), (5, 4 + 16 + 4 + 0)]
    with pytest.raises(
        UserError, match="a picture of 9 crops and 5 tokens is larger than the largest of this model, 5"
    ):
        level_of(9, 5, TINY)


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def test_a_batch_of_pictures_of_different_sizes(tmp_path):
    processor = load_image_processor(tmp_path, TINY)
    images = [as_tokens(picture(*size), processor, TINY) for size in ((50, 50), (20, 60), (28, 56))]
    assert [len(image.crops) for image in images] == [5, 4, 3]
    alone = whole(images[0].crops[0], TINY)
    rows = [
        Row([1, IMAGE_PLACEHOLDER, 7], images[:1]),
        Row([1, *[IMAGE_PLACEHOLDER] * 2], [alone, images[2]]),
        Row([1]),
    ]
    batch = assemble(rows, TINY, choose_bucket(rows, TINY))
    assert batch.bucket.images == (24, 16)
    assert batch.crops.shape == (3, 8, 28, 28, 3)
    np.testing.assert_array_equal(batch.crops[1, 0], alone.crops[0])
    np.testing.assert_array_equal(batch.crops[1, 1:4], images[2].crops)
    first, second = (batch.feature_index[1, batch.image_id[1] == m, 0] for m in (1, 2))
    assert first.tolist() == [0, 1, 2, 3, 32]  # the newline vector follows the features of all 8 crops
    assert second.tolist() == [32 if n == NEWLINE else n + 4 for n in images[2].index[:, 0]]


def test_the_size_of_a_file_is_that_of_the_upright_picture(tmp_path):
    image = picture(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.png")
    assert image_size(tmp_path / "turned.jpg") == (30, 20)
    assert image_size(tmp_path / "plain.png") == (20, 30)
    (tmp_path / "none.png").write_text("no picture")
    with pytest.raises(UserError, match=r"none\.png: cannot be read as a picture"):
        image_size(tmp_path / "none.png")


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_picture_that_is_too_narrow(size):
    with pytest.raises(UserError, match="is too narrow: nothing of it would be left in its tiles"):
        token_table(size, NEXT, 336, 24)


def test_a_picture_ten_times_as_wide_as_high():
    """7.2 of 24 rows of features, so that rounding decides about one row of padding."""
    assert grid_shape((100, 1000), NEXT, 336) == (1, 3)
    assert len(token_table((100, 1000), NEXT, 336, 24)[0]) == 24**2 + 8 * (3 * 24 + 1)


def test_a_processor_of_other_resolutions_is_refused(tmp_path):
    settings = {"size": {"shortest_edge": 28}, "crop_size": 28, "image_grid_pinpoints": [[28, 56]]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"tiles pictures into \[\[28, 56\]\], the model into .*: copy"):
        load_image_processor(tmp_path, TINY)


def test_a_video_is_one_image_of_shrunk_frames(tmp_path):
    """24 features per side become 12, means of four; a bucket holds a power of two of frames."""
    config = LlavaConfig(tiling=Tiling.next())
    frames = np.zeros((3, 8, 8, 3), np.float32)
    video = pooled(frames, config)
    assert len(video) == 3 * 144
    assert video.index[145].tolist() == [576 + n for n in (2, 3, 26, 27)]
    assert set(video.weight.ravel().tolist()) == {0.25}
    assert level_of(3, len(video), config, video=True) == (4, 4 * 144)
    with pytest.raises(UserError, match="a video needs at least one frame, got none"):
        frames_as_tokens(Video([]), load_image_processor(tmp_path, TINY), TINY)


def test_a_video_beside_a_picture(tmp_path):
    processor = load_image_processor(tmp_path, TINY)
    rows = [
        Row([IMAGE_PLACEHOLDER, 7], [frames_as_tokens(Video([picture(50, 50)] * 3), processor, TINY)]),
        Row([IMAGE_PLACEHOLDER, 7], [as_tokens(picture(50, 50), processor, TINY)]),
    ]
    batch = assemble(rows, TINY, choose_bucket(rows, TINY))
    assert (batch.bucket.images, batch.bucket.crops) == ((24,), 5)
    assert batch.feature_index.shape == batch.feature_weight.shape == (2, 56, 4)
    np.testing.assert_array_equal(batch.feature_index[0, 1], [4, 5, 6, 7])  # of the second frame
    np.testing.assert_array_equal(batch.feature_weight[1, 1], [1, 0, 0, 0])
