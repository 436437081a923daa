"""Pictures of what stays, and ``pdrop generate --picture``."""

import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from pdrop_jax.analysis import figures
from pdrop_jax.analysis.figures import (
    DIM,
    GAP,
    TEXT,
    answer_picture,
    save_picture,
    score_picture,
)
from pdrop_jax.analysis.patches import as_seen
from pdrop_jax.cli import main
from pdrop_jax.config import LlavaConfig, Tiling, VisionConfig
from pdrop_jax.convert.importer import convert
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.images import load_image_processor
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.schedule import DropSchedule

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PHOTO = GOLDEN / "img_astronaut_square_small.png"
WHITE = Image.new("RGB", (336, 336), (255, 255, 255))
DIMMED = round(255 * DIM + 160 * (1 - DIM))


def panel(picture, number, height=336, width=336):
    left = GAP + (number - 1) * (width + GAP)
    return np.asarray(picture)[GAP : GAP + height, left : left + width]


def seen(photo, processor):
    return np.asarray(as_seen(processor.tokens(photo, alone=True).crops[None], processor))


def processor(aspect, folder=None, size=336):
    config = LlavaConfig(vision=VisionConfig(image_size=size), image_aspect=aspect)
    folder = folder or pathlib.Path("/nonexistent")
    return Processor(config, None, load_image_processor(folder, config))


def kept_picture(image, kept, grid):
    """``image`` with all tokens of a grid (rows, columns), then with those of each list."""
    count = grid[0] * grid[1]
    masks = [np.isin(np.arange(count), list(tokens)).reshape(grid) for tokens in [range(count), *kept]]
    return figures._band(image, figures._dimmed([(mask, int(mask.sum())) for mask in masks]))


def test_dropped_patches_are_dimmed_and_kept_ones_are_as_they_were():
    picture = kept_picture(WHITE, [[0, 1, 4, 15], [4]], (4, 4))
    assert (panel(picture, 1) == 255).all()
    for number, kept in ((2, {0, 1, 4, 15}), (3, {4})):
        patches = panel(picture, number).reshape(4, 84, 4, 84, 3)
        for token in range(16):
            expected = 255 if token in kept else DIMMED
            assert (patches[token // 4, :, token % 4] == expected).all()


def test_every_stage_has_its_numbers_under_it():
    few, many = (np.asarray(kept_picture(WHITE, [kept], (4, 4))) for kept in ([1], range(11)))
    below = slice(GAP + 336, None)
    assert (few[below] < 100).any()
    assert (few[below] != many[below]).any()  # "1 of 16", "11 of 16"
    dense = kept_picture(WHITE, [], (4, 4))
    assert dense.width == 336 + 2 * GAP


def test_small_and_oblong_pictures():
    picture = kept_picture(Image.new("L", (112, 56), 255), [[0], []], (2, 4))
    assert (panel(picture, 1, 168, 336) == 255).all()
    cells = panel(picture, 2, 168, 336)
    assert (cells[:84, :84] == 255).all()
    assert (cells[84:] == DIMMED).all()
    assert (panel(picture, 3, 168, 336) == DIMMED).all()


def test_square_shows_the_centre_and_pad_shows_everything():
    photo = Image.new("RGB", (300, 100), (0, 0, 0))
    photo.paste((255, 255, 255), (100, 0, 200, 100))
    square = seen(photo, processor("square"))
    assert square.shape == (336, 336, 3)
    assert (square[:, 20:-20] > 250).all()
    padded = seen(photo, processor("pad"))
    bar = [int(mean * 255) for mean in processor("pad").image_processor.image_mean]
    assert np.abs(padded[10].astype(int) - bar).max() <= 1
    assert (padded[168, 168] > 250).all()
    assert (padded[168, 20] < 5).all()


def test_a_photo_is_seen_as_it_is():
    ours = seen(PHOTO, processor("square")).astype(int)
    photo = Image.open(PHOTO).convert("RGB")
    assert photo.width == photo.height
    same = np.asarray(photo.resize((336, 336), Image.Resampling.BICUBIC), int)
    assert np.abs(ours - same).max() <= 1


def test_a_heat_map_is_red_where_the_score_is_largest_and_dim_where_nothing_is_left():
    scores = np.arange(576, dtype=np.float32)
    second = np.where(scores < 288, np.nan, -scores)
    picture = score_picture([WHITE], [[scores], [second]], processor("square"))
    first, then = (panel(picture, n).reshape(24, 14, 24, 14, 3)[:, 7, :, 7] for n in (1, 2))
    assert first[0, 0].tolist() == [255, 255, 255]
    assert first[-1, -1].tolist() == [255, 38, 38]  # 0.15 of white
    green = first[..., 1].reshape(-1).astype(int)
    assert (np.diff(green) <= 0).all()
    assert (then[:12] == DIMMED).all()
    assert then[12, 0].tolist() == [255, 38, 38]
    assert then[-1, -1].tolist() == [255, 255, 255]
    with pytest.raises(UserError, match="nothing is dropped by this schedule"):
        score_picture([WHITE], [], processor("square"))


def test_several_pictures_are_several_rows():
    kept = [[[0, 1], [5]], [[1], []]]  # [stage boundary][image]
    picture = answer_picture([PHOTO, WHITE], kept, processor("square"))
    single = answer_picture([PHOTO], [[[0, 1]], [[1]]], processor("square"))
    assert picture.size == (single.width, 2 * single.height)
    np.testing.assert_array_equal(np.asarray(picture)[: single.height], np.asarray(single))
    with pytest.raises(UserError, match="no picture"):
        answer_picture([], [], processor("square"))


def test_tiles_are_a_row_of_their_own():
    """Of two tiles side by side, a token of the second lies right of the middle."""
    config = LlavaConfig(vision=VisionConfig(image_size=28), tiling=Tiling(((28, 56),)))
    tiled = Processor(config, None, load_image_processor(pathlib.Path("/nonexistent"), config))
    image = Image.new("RGB", (56, 28), "white")
    kept = [[[3, 6]]]  # the whole's last token, and in the first line the first of the second tile
    picture = answer_picture([image], kept, tiled)
    whole = np.asarray(picture)[GAP : GAP + 336]
    assert (whole[168:, GAP + 336 + GAP + 168 : GAP + 336 + GAP + 336] == 255).all()
    assert (whole[:168, GAP + 336 + GAP :][:, :336] < 255).all()
    tiles = np.asarray(picture)[picture.height - (GAP + TEXT + GAP) - 168 :][:168, GAP + 336 + GAP :][:, :336]
    cells = tiles.reshape(2, 84, 4, 84, 3).min((1, 3, 4)) == 255
    assert cells.tolist() == [[False, False, True, False], [False] * 4]


def test_saving(tmp_path):
    target = tmp_path / "out.png"
    target.write_text("older")
    with pytest.raises(UserError, match=r"out\.png exists: choose another name"):
        save_picture(WHITE, target)
    assert target.read_text() == "older"
    save_picture(WHITE, target, overwrite=True)
    assert Image.open(target).size == WHITE.size
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    with pytest.raises(UserError, match=r"\.png"):
        save_picture(WHITE, tmp_path / "out.txt")
    with pytest.raises(UserError, match="no folder"):
        save_picture(WHITE, tmp_path / "nowhere" / "out.png")
    with pytest.raises(UserError, match=r"20000x10 pixels cannot be written: .*; use \.png"):
        save_picture(Image.new("RGB", (20000, 10)), tmp_path / "wide.webp")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "model"
    schedule = DropSchedule((2, 4, 6), (0.5, 0.25, 0.125))
    convert(GOLDEN / "model_mha", folder, tokenizer=ROOT / "examples" / "tiny_tokenizer", schedule=schedule)
    return folder


@pytest.fixture
def generate(monkeypatch, capfd):
    """Runs ``pdrop generate`` in this process; gives exit code, stdout, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["pdrop", "generate", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capfd.readouterr())

    return run


def test_generate_draws_what_it_kept(generate, model, tmp_path):
    out = tmp_path / "kept.png"
    common = ("--model", model, "--image", PHOTO, "--prompt", "Who is it?", "--max-new-tokens", 1)
    code, stdout, stderr = generate(*common, "--json", "--picture", out)
    assert (code, stderr) == (0, "")
    kept = json.loads(stdout)["kept"]
    with Image.open(out) as picture:
        assert picture.width == GAP + 4 * ((picture.width - GAP) // 4)
        edge = (picture.width - GAP) // 4 - GAP
        first, last = panel(picture, 1, edge, edge), panel(picture, 4, edge, edge)
    same = (first == last).all(-1).reshape(4, edge // 4, 4, edge // 4).mean((1, 3))
    assert sorted(np.argsort(same.ravel())[-2:].tolist()) == kept[2][0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--prompt", "Who?", "Where?", "--image", PHOTO, "--picture", "out.png"), "one at a time"),
        (("--prompt", "Who?", "--picture", "out.png"), "--image"),
        (("--prompt", "Who?", "--image", PHOTO, "--picture", "out.doc"), ".doc"),
        (("--prompt", "Who?", "--image", PHOTO, "--picture", "nowhere/out.png"), "no folder"),
    ],
)
def test_mistakes_with_pictures(generate, model, monkeypatch, tmp_path, args, words):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = generate("--model", model, *args)
    assert (code, stdout) == (2, "")
    (line,) = stderr.strip().splitlines()
    assert words in line


def test_without_a_model_the_demo_is_asked(generate, monkeypatch, tmp_path):
    for module in ("generation", "convert"):
        monkeypatch.setattr(f"pdrop_jax.{module}.pretrained.DEMO", tmp_path / "demo")
    code, stdout, stderr = generate("--prompt", "Who?")
    assert (code, stdout) == (2, "")
    assert "--model" in stderr
