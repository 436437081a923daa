"""Pictures of any size on the host: layout, buckets, and what is refused."""

import itertools
import json
import pathlib

import numpy as np
import pytest
import tiny_qwen
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_qwen import photo
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from pdrop_jax.analysis.figures import GAP, LONG_EDGE, answer_picture, score_picture
from pdrop_jax.analysis.patches import TOKEN
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.families.qwen2_vl.inputs import lay_out
from pdrop_jax.generation.engine import generate, start
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.anyres import levels
from pdrop_jax.inputs.buckets import level_of
from pdrop_jax.inputs.downsample import downsampled
from pdrop_jax.inputs.images import as_tokens, blank, load_image_processor, measure
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model.scores import grid
from pdrop_jax.schedule import DropSchedule

TINY = QwenVisionConfig(patch_size=1, hidden_size=16, num_heads=2, window_size=6)


@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8))
def test_windows_hold_what_transformers_puts_into_them(frames, rows, columns):
    grid = torch.tensor([[frames, 2 * rows, 2 * columns]])
    n = int(grid.prod())
    found = lay_out(np.arange(n, dtype=np.float32)[:, None] * np.ones(6, np.float32), tuple(grid[0].tolist()), TINY)
    order, edges = get_vision_window_index(grid, spatial_merge_size=2, window_size=6, patch_size=1)
    # Every patch carries its number. Empty places have frame 0.
    there = found.layout[..., 2] > 0
    numbers = [set(window[here, 0].astype(int)) for window, here in zip(found.crops, there, strict=True)]
    patches = (order[:, None] * 4 + torch.arange(4)).reshape(-1)
    expected = [set(patches[a:b].tolist()) for a, b in itertools.pairwise(edges.tolist())]
    assert numbers == expected
    places = np.zeros((n, 2), int)
    places[found.crops[there][:, 0].astype(int)] = found.layout[there][:, :2]
    assert places.tolist() == get_vision_position_ids(grid, 2).tolist()
    assert found.crops.reshape(-1, 4, 6)[found.index[:, 0], :, 0].reshape(-1).tolist() == list(range(n))


@pytest.mark.parametrize("kind", tiny_qwen.KINDS)
def test_pictures_are_measured_without_reading_them(kind, folders):
    config = LlavaConfig.load(folders[kind][1])
    processor = load_image_processor(folders[kind][1], config)
    for size in ((28, 28), (40, 50), (300, 120), (9, 700), (75, 700)):
        picture = photo(*size)
        found = measure(picture, processor, config, alone=True)
        assert found == as_tokens(picture, processor, config).size
        crops, tokens = level_of(*found[:2], config)
        assert crops >= found.crops
        assert tokens >= found.tokens
    assert blank(config).size.tokens == 1


def test_levels_hold_pictures_four_times_as_wide_as_high():
    config = LlavaConfig.qwen2_5_vl("7b")
    known = levels(config)
    assert known[-1][1] >= config.text.max_length
    for rows in range(1, 100):
        for columns in range(rows, 4 * rows + 1):
            windows, tokens = -(-rows // 4) * -(-columns // 4), rows * columns
            assert level_of(windows, tokens, config)[1] == min(n for _, n in known if n >= tokens)


def test_pictures_of_one_bucket_compile_once(folders):
    model = load(folders["qwen2_5_vl"][1], schedule=DropSchedule((1,), (0.5,)))
    sizes = [(170, 170), (150, 200), (200, 150), (240, 110), (165, 190)]  # 33 to 48 tokens
    counts = set()
    for n, size in enumerate(sizes):
        answer = generate(model, ["What?"], [photo(*size, n)], Sampling(max_new_tokens=2))
        counts.add(answer.image_tokens[0][0])
        if not n:
            compiled = start._cache_size()
    assert start._cache_size() == compiled
    assert len(counts) >= 3


def copied(folder, tmp_path, **changes):
    """Another checkpoint's files with other settings of its image processor."""
    for path in pathlib.Path(folder).iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 16}, "has patch_size 16, but the vision tower has 14"),
        ({"merge_size": 4}, "has merge_size 4, but the vision tower has 2"),
        ({"temporal_patch_size": 1}, "has temporal_patch_size 1, but the vision tower has 2"),
        ({"size": {"shortest_edge": 9000, "longest_edge": 4000}}, r"resizes pictures to 9000 to 4000 pixels"),
        ({"size": {"height": 10, "width": 10}}, r"has an unknown key size\.height"),
        ({"size": {"shortest_edge": -1, "longest_edge": 4000}}, r"size\.shortest_edge is -1"),
    ],
)
def test_an_image_processor_that_contradicts_the_model(changes, message, folders, tmp_path):
    config = LlavaConfig.load(folders["qwen2_5_vl"][1])
    with pytest.raises(UserError, match=message) as error:
        Processor.load(copied(folders["qwen2_5_vl"][1], tmp_path, **changes), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        ((3, 700), {}, "a picture of 700x3 pixels is too narrow"),
        ((20, 300), {"do_resize": False}, "300x20 pixels is not made of tokens of 28 pixels a side"),
        ((14, 14), {"do_resize": False}, "14x14 pixels is not made of tokens of 28 pixels a side"),
        (
            (2100, 2100),
            {"size": {"shortest_edge": 3136, "longest_edge": 5 * 10**7}},
            r"becomes 5625 tokens, but the model has 4096 positions: lower size\.longest_edge \(max_pixels, now 5000",
        ),
    ],
)
def test_pictures_that_do_not_fit(size, changes, message, folders, tmp_path):
    folder = copied(folders["qwen2_vl"][1], tmp_path, **changes)
    processor = Processor.load(folder, LlavaConfig.load(folder))
    for look in (
        lambda image: processor(["?"], [image]),
        lambda image: measure(image, processor.image_processor, processor.config, alone=True),
    ):
        with pytest.raises(UserError, match=message) as error:
            look(Image.new("RGB", size[::-1]))
        assert "\n" not in str(error.value)


def test_kept_tokens_and_scores_are_drawn_on_the_grid_of_the_picture(folders):
    """Row by row, although the tower lays patches out in windows."""
    processor = load(folders["qwen2_5_vl"][1]).processor
    picture = photo(90, 180, 1)
    tokens = processor.tokens(picture, alone=True)
    rows, columns = tokens.positions.max(0)[1:] + 1
    assert rows * columns == len(tokens) > columns > rows
    kept = [1, columns]  # the second token of the first row, and the first of the second
    drawn = np.asarray(answer_picture([picture], [[kept]], processor), int)
    heat = np.asarray(score_picture([picture], [[np.eye(len(tokens))[columns]]], processor), int)
    width = columns * TOKEN
    factor = max(1, LONG_EDGE // (max(rows, columns) * TOKEN))
    whole, dimmed = (
        drawn[GAP : GAP + rows * TOKEN * factor, left : left + width * factor]
        for left in (GAP, 2 * GAP + width * factor)
    )
    same = (whole == dimmed).all(-1).reshape(rows, TOKEN * factor, columns, -1).all((1, 3))
    assert np.flatnonzero(same).tolist() == kept
    reds = heat[GAP : GAP + rows * TOKEN * factor, GAP : GAP + width * factor]
    red = (reds[..., 0] - reds[..., 1]).reshape(rows, TOKEN * factor, columns, -1).mean((1, 3))
    assert red.argmax() == columns


def test_feather_keeps_every_third_token_of_every_third_line(folders):
    """Of each picture by its own size, at any place in the prompt."""
    processor = load(folders["qwen2_vl"][1]).processor
    pictures = [photo(90, 180, 1), photo(200, 120, 2)]
    batch = processor(["Which?", "And this?"], [pictures, pictures[1]])
    found = np.asarray(grid(processor.config, batch, None))
    for b, row in enumerate([pictures, pictures[1:]]):
        for number, picture in enumerate(row, 1):
            places = processor.tokens(picture, alone=False).positions[:, 1:]
            expected = (places % 3 == 0).all(1)
            assert found[b][batch.image_id[b] == number].tolist() == expected.tolist()
        assert not found[b][batch.image_id[b] == 0].any()


@pytest.mark.parametrize("tokens", [12, 7, 1])
def test_a_downsampled_picture_is_a_smaller_one(folders, tokens):
    """Of the same shape, with up to so many tokens, and not one line of tokens less than would fit."""
    model = load(folders["qwen2_5_vl"][1])
    settings, config = model.processor.image_processor, model.config
    picture = tiny_qwen.photo(112, 168)
    whole = as_tokens(picture, settings, config)
    found = downsampled(
        picture, lambda n: tokens if n == len(whole) else pytest.fail("of another picture"), settings, config
    )
    assert len(whole) == 24
    assert tokens / 2 <= len(found) <= max(tokens, 4)
    assert found.positions.max(0).tolist()[1] <= found.positions.max(0).tolist()[2]
