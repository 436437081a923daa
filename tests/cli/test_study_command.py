"""``pdrop study``: its files, and what it says of bad input before it loads a model."""

import json
import pathlib

import pytest
from PIL import Image

GRIDS = pathlib.Path(__file__).parents[2] / "examples" / "grids"
DEMO = pathlib.Path(__file__).parents[2] / "pdrop_jax" / "demo"


def test_the_command(pdrop, tmp_path):
    files = [tmp_path / name for name in ("study.json", "study.png", "study.html")]
    result = pdrop(
        *("study", "--model", DEMO, "--questions", GRIDS / "questions.jsonl", "--images", GRIDS, "--limit", 10),
        *("--layers", 1, "--ratios", 0.0, 1.0, "--scores", "pyramiddrop", "--batch-size", 5),
        *("--out", files[0], "--plot", files[1], "--html", files[2]),
    )
    assert result.code == 0, result.stderr
    data = json.loads(files[0].read_text())
    names = [row["setting"]["name"] for row in data["rows"]]
    assert [line.split(" | ")[0].strip("| ") for line in result.stdout.splitlines()] == ["", "---", "dense", *names]
    assert names[:2] == ["layer 1, ratio 0", "layer 1, ratio 1"]
    assert data["questions"] == 10
    assert data["pictures"] < 10
    assert f"has only {data['pictures']} image" in result.stderr
    assert Image.open(files[1]).width == 1650
    assert files[2].read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "none"), "--layers takes whole numbers or 'all', got none"),
        (("--layers", "8"), "drop after layer 8 in a decoder of 8 layers"),
        (("--ratios", "1.5"), "keep ratios must be in 0..1, got [1.5]"),
        (("--scores", "nrom"), "unknown score 'nrom': did you mean 'norm'?"),
        (("--schedule-layers", "none"), "the schedule drops nothing, so there is nothing to study"),
        (("--html", "report.txt"), "report.txt: the name ends in '.txt', expected .html"),
        (("--plot", "nowhere/plot.png"), "there is no folder nowhere"),
        (("--limit", "0"), "--limit must be at least 1, got 0"),
        (("--questions", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
    ],
)
def test_bad_input(arguments, message, fails):
    command = ("study", "--model", DEMO, "--questions", GRIDS / "questions.jsonl", "--images", GRIDS)
    assert message in fails(*command, *arguments)
