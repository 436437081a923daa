"""Pictures with fewer tokens: means over equal cells of the features, or smaller pictures."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from tiny import GQA, llava_config

from pdrop_jax.batch import Bucket
from pdrop_jax.config import Tiling
from pdrop_jax.inputs.anyres import ImageTokens
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.downsample import averages, downsampled, measure_downsampled
from pdrop_jax.inputs.images import load_image_processor, measure
from pdrop_jax.schedule import DropSchedule

CONFIG = llava_config(GQA, DropSchedule.none())  # 4 x 4 features


def area_means(grid, rows, columns):
    """By splitting each feature into as many as there are cells, in both directions."""
    side = len(grid)
    fine = grid.repeat(rows, 0).repeat(columns, 1)
    return fine.reshape(rows, side, columns, side).mean((1, 3)).ravel()


@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (6, (2, 3)), (9, (3, 3)), (15, (3, 4)), (16, (4, 4))]
)
def test_means_of_equal_cells(tokens, shape):
    grid = np.random.default_rng(0).normal(size=(4, 4))
    index, weight = averages(CONFIG, tokens)
    assert len(index) == shape[0] * shape[1] <= tokens
    np.testing.assert_allclose((grid.ravel()[index] * weight).sum(1), area_means(grid, *shape), rtol=1e-6)
    np.testing.assert_allclose(weight.sum(1), 1, rtol=1e-6)


def test_a_class_token_stays():
    config = dataclasses.replace(CONFIG, keep_class_token=True)
    index, weight = averages(config, 5)
    assert index[0][weight[0] > 0].tolist() == [0]
    assert index[1][weight[1] > 0].tolist() == [1, 2, 5, 6]


def test_a_row_of_pictures_of_several_kinds(tmp_path):
    """Beside a picture whose tokens are not blended; what is not used has weight 0."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    found = downsampled(picture, lambda n: n // 2, load_image_processor(tmp_path, CONFIG), CONFIG)
    whole = ImageTokens(found.crops, np.arange(16, dtype=np.int32)[:, None])
    ids = [1, IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER, 2]
    batch = assemble([Row(ids, [whole, found])], CONFIG, Bucket(2, (16, 16)))
    assert batch.length.tolist() == [2 + 16 + 8]
    weight, index = batch.feature_weight[0], batch.feature_index[0]
    first, second = (batch.image_id[0] == m for m in (1, 2))
    np.testing.assert_array_equal(weight[first], np.eye(1, weight.shape[1]).repeat(16, 0))
    np.testing.assert_array_equal(index[first][:, 0], np.arange(16))
    np.testing.assert_allclose(weight[second].sum(1), 1, rtol=1e-6)
    assert set(index[second][weight[second] > 0]) == set(range(16, 32))


@pytest.mark.parametrize("size", [(112, 112), (100, 40), (30, 200)])
def test_a_picture_in_tiles_gets_the_nearest_number(tmp_path, size):
    """Of those of smaller pictures of its shape; several pictures in a row are whole, as they always are."""
    grids = ((16, 32), (32, 16), (32, 32), (16, 48), (48, 16), (48, 48))
    config = dataclasses.replace(CONFIG, tiling=Tiling(grids, rounded=True, alone=True))
    processor = load_image_processor(tmp_path, config)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    whole = measure(picture, processor, config, alone=True)
    there = {
        measure(picture.resize((size[1] * n // 16, size[0] * n // 16)), processor, config, alone=True).tokens
        for n in range(8, 17)
    }
    counts = []
    for wanted in (whole.tokens, whole.tokens // 2, 1):
        given = []

        def tokens_of(n, wanted=wanted, given=given):
            given.append(n)
            return wanted

        found = downsampled(picture, tokens_of, processor, config)
        assert set(given) == {whole.tokens}
        assert found.size == measure_downsampled(picture, tokens_of, processor, config, alone=True)
        assert abs(len(found) - wanted) <= min(abs(n - wanted) for n in there)
        counts.append(len(found))
    assert counts[0] == whole.tokens >= counts[1] >= counts[2] > 0
    beside = measure_downsampled(picture, lambda n: n // 2, processor, config, alone=False)
    assert beside == measure(picture, processor, config, alone=False)
