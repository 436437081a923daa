"""``pdrop study``: its files, and what it says of bad input before it loads a model."""

import json
import pathlib

import pytest
from PIL import Image

GRIDS = pathlib.Path(__file__).parents[2] / "examples" / "grids"
DEMO = pathlib.Path(__file__).parents[2] / "pdrop_jax" / "demo"


def test_the_command(pdrop, tmp_path, short_demo):
    files = [tmp_path / name for name in ("study.json", "study.png", "study.html")]
    result = pdrop(
        *("study", "--model", short_demo, "--questions", GRIDS / "questions.jsonl", "--images", GRIDS, "--limit", 5),
        *("--layers", 1, "--ratios", 0.0, 1.0, "--scores", "pyramiddrop", "--batch-size", 5),
        *("--edit-sizes", 25, "--out", files[0], "--plot", files[1], "--html", files[2]),
    )
    assert result.code == 0, result.stderr
    data = json.loads(files[0].read_text())
    names = [row["setting"]["name"] for row in data["rows"]]
    assert [line.split(" | ")[0].strip("| ") for line in result.stdout.splitlines()] == ["", "---", "dense", *names]
    assert names[:2] == ["layer 1, ratio 0", "layer 1, ratio 1"]
    assert data["questions"] == 5
    assert data["pictures"] < 5
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
        (("--limit", "1"), "a paired test needs at least 2 questions, got 1: ask more"),
        (("--edit-sizes", "0"), "edit sizes are percentages above 0 and up to 1000, got [0.0]"),
        (("--draws", "-1"), "the number of draws must be in 0..1000, got -1"),
        (("--paraphrases", GRIDS / "annotations.json"), "annotations.json line 1 is malformed"),
        (("--paraphrases", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("--power", "120"), "shares in 0..1, got 40 questions, a rewording that changes 120% of the answers"),
        (("--num-processes", "2"), "--num-processes and --process-id must be given together"),
        (("--num-processes", "2", "--process-id", "0"), "2 processes share a study through its file: name it, --out"),
        (("--num-processes", "2", "--process-id", "2"), "process 2 of 2: processes are numbered 0 to 1"),
        (("--num-processes", "0", "--process-id", "0"), "the number of processes must be at least 1, got 0"),
        (("--mesh", "data=2"), "the mesh needs 2 devices (data 2 * fsdp 1 * tensor 1), but there are 1"),
    ],
)
def test_bad_input(arguments, message, fails):
    command = ("study", "--model", DEMO, "--questions", GRIDS / "questions.jsonl", "--images", GRIDS)
    assert message in fails(*command, *arguments)


def test_power_needs_no_model(pdrop):
    command = ("study", "--model", "nowhere", "--questions", GRIDS / "questions.jsonl", "--images", GRIDS)
    result = pdrop(*command, "--power", 20)
    head, _, *rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()]
    assert head == ["answers changed, %", "10 questions", "40 questions", "160 questions"]
    assert [row[0] for row in rows] == ["21", "22", "25", "30", "40"]
    powers = [[float(cell) for cell in row[1:]] for row in rows]
    assert powers == sorted(powers, key=lambda row: row[-1])
    assert powers[-1][-1] > 0.9 > powers[0][-1]
