"""``pdrop eval`` and ``pdrop score`` as a user types them."""

import json
import pathlib
import sys

import pytest
from tiny_run import write_start

from pdrop_jax.cli import main

GRIDS = pathlib.Path(__file__).parents[2] / "examples" / "grids"
FILES = ("--questions", GRIDS / "questions.jsonl", "--images", GRIDS)


@pytest.fixture
def pdrop(monkeypatch, capfd):
    """Runs the command in this process; gives exit code, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["pdrop", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capfd.readouterr()

    return run


def fails(result):
    """The one line of a user's mistake."""
    code, stdout, stderr = result
    assert (code, stdout) == (2, "")
    (line,) = stderr.strip().splitlines()
    return line


def test_questions_are_answered_and_scored(pdrop, tmp_path):
    model, out = write_start(tmp_path / "model"), tmp_path / "a.jsonl"
    asked = ("eval", "--model", model, *FILES, "--out", out, "--max-new-tokens", 2, "--batch-size", 2)
    code, stdout, _ = pdrop(*asked, "--json")
    said = json.loads(stdout)
    assert (code, said["questions"], said["answered"], said["out"]) == (0, 40, 40, str(out))
    assert pdrop(*asked)[:2] == (0, f"{out}: all 40 questions were already answered\n")
    assert "of another schedule" in fails(pdrop(*asked, "--layers", "none"))
    score = ("score", "gqa", "--answers", out, "--annotations", GRIDS / "annotations.json")
    code, stdout, _ = pdrop(*score)
    assert (code, stdout.splitlines()[0].split()) == (0, ["all", "accuracy", "0.00", "%", "answers", "40"])
    assert json.loads(pdrop(*score, "--json")[1])["groups"]["binary"] == {"accuracy": 0, "answers": 8}
    assert "pope needs --questions FILE" in fails(pdrop(*score, *FILES[:2]))
    assert "annotations" in fails(pdrop("score", "vqav2", *score[2:]))


def test_the_demo_models_annotations_score_full_marks(pdrop, tmp_path):
    truths = json.loads((GRIDS / "annotations.json").read_text())
    lines = [json.dumps({"question_id": name, "text": x["answer"].title() + "."}) for name, x in truths.items()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    stdout = pdrop("score", "gqa", "--answers", tmp_path / "a.jsonl", "--annotations", GRIDS / "annotations.json")[1]
    assert stdout.splitlines()[0].split() == ["all", "accuracy", "100.00", "%", "answers", "40"]


def test_mistakes_are_named_before_the_model_is_read(pdrop, tmp_path):
    nowhere = (
        "eval",
        "--model",
        tmp_path / "model",
        "--questions",
        GRIDS / "questions.jsonl",
        "--out",
        tmp_path / "a.jsonl",
    )
    assert "40 pictures are not there" in fails(pdrop(*nowhere, "--images", tmp_path))
    assert "is not a checkpoint" in fails(pdrop(*nowhere, "--images", GRIDS))
    assert "temperature" in fails(pdrop(*nowhere, "--images", GRIDS, "--temperature", -1))
    assert list(tmp_path.iterdir()) == []
