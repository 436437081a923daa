"""A study that is interrupted, or shared by processes, ends with the same file."""

import json
import os

import numpy as np
import pytest
from command import Forked, kill_at_line
from mutations import mutations, one_line
from PIL import Image
from tiny_run import write_start

from pdrop_jax.analysis.settings import StudyOptions
from pdrop_jax.analysis.study import run_study
from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import read_questions
from pdrop_jax.eval.shares import Share
from pdrop_jax.generation.pretrained import load

SETTINGS = ("--layers", 1, "--ratios", 0.5, "--scores", "random", "--edit-sizes", 50, "--draws", 1)
SETTINGS = (*SETTINGS, "--batch-size", 2, "--max-new-tokens", 1)
OPTIONS = StudyOptions(layers=[1], ratios=[0.5], scores=["random"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, images/ and q.jsonl."""
    folder = tmp_path_factory.mktemp("study")
    write_start(folder / "model")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for n in range(6):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), np.uint8)).save(folder / "images" / f"{n}.png")
        lines.append({"question_id": n, "text": f"What is in {n}?", "image": f"{n}.png", "answer": "x"})
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def command(folder):
    paths = ("--model", folder / "model", "--questions", folder / "q.jsonl", "--images", folder / "images")
    return ("study", *paths, *SETTINGS)


def test_a_process_is_killed_and_two_go_on(pdrop, fails, command, folder, tmp_path):
    """Killed with its first answers; then two processes share the rest, and the last to finish writes the file."""
    out = tmp_path / "shared.json"
    shared = (*command, "--out", out, "--num-processes", 2, "--process-id")
    kill_at_line(Forked(*shared, 0), tmp_path / "shared.json.unfinished", 3)
    other = pdrop(*shared, 1)
    assert other.stdout == f"{out}: process 1 of 2 has answered its share; the last process to finish writes the file\n"
    assert "of a study of another set of edit sizes: [50.0], this run has [70.0]" in fails(
        *shared, 0, "--edit-sizes", 70
    )
    assert pdrop(*shared, 0).stdout.startswith("|  | tokens |")
    assert os.listdir(tmp_path) == ["shared.json"]
    alone = tmp_path / "alone.json"
    assert pdrop(*command, "--out", alone).code == 0
    assert out.read_bytes() == alone.read_bytes()
    assert pdrop(*shared, 1).stdout == f"{out}: this study is complete\n"
    assert "is of a study of another set of scores: " in fails(*command, "--out", alone, "--scores", "norm")
    assert fails(*command, "--out", folder / "q.jsonl").endswith(
        "q.jsonl is read by this command: write to another file"
    )
    (tmp_path / "mine.json").write_text("precious")
    assert "mine.json exists: choose another name" in fails(*command, "--out", tmp_path / "mine.json")


@pytest.fixture(scope="module")
def studied(folder, tmp_path_factory):
    """(run, out, lines of the journal, the study): ``run`` goes on from the journal."""
    questions, model = read_questions(folder / "q.jsonl", folder / "images"), load(folder / "model")
    out = tmp_path_factory.mktemp("answers") / "s.json"

    def run(metadata=1, share=Share()):
        return run_study(
            model, questions, OPTIONS, batch_size=2, max_new_tokens=1, out=out, metadata={"x": metadata}, share=share
        )

    study = run()
    return run, out.with_name("s.json.unfinished"), out.with_name("s.json.unfinished").read_bytes(), study


@pytest.mark.parametrize(("lines", "torn"), [(0, b""), (1, b'{"ans'), (4, b""), (11, b"\xff"), (30, b"")])
def test_it_goes_on_after_any_line(studied, lines, torn):
    run, path, content, study = studied
    path.write_bytes(b"".join(content.splitlines(keepends=True)[:lines]) + torn)
    assert run().as_json() == study.as_json()
    assert sorted(path.read_bytes().splitlines()) == sorted(content.splitlines())


def test_what_is_no_journal_of_this_study(studied):
    """Any value of a line replaced, and answers of another study; what is accepted is an answer."""
    run, path, content, _study = studied
    with pytest.raises(UserError, match="is of a study of another x: 1, this run has 2; name another file"):
        run(metadata=2)
    header, line, *rest = content.splitlines(keepends=True)
    path.write_bytes(line)
    with pytest.raises(UserError, match="unfinished is not of a study"):
        run()
    refused = 0
    for where, value, changed in mutations(json.loads(line)):
        path.write_bytes(b"".join([header, json.dumps(changed).encode() + b"\n", *rest]))
        with one_line((where, value)) as said:
            run()
        refused += len(said)
    assert refused > 60


def test_processes_of_different_studies(studied):
    """One that starts later with other settings is noticed before answers are mixed."""
    run, path, content, _study = studied
    path.write_bytes(b"")
    assert run(share=Share(1, 2)) is None
    other = path.with_name(path.name + "-1")
    other.write_bytes(other.read_bytes().replace(b'"x": 1', b'"x": 2'))
    with pytest.raises(UserError, match="unfinished-1 is of a study of another x: 2, this run has 1"):
        run(share=Share(0, 2))
    other.unlink()
    path.write_bytes(content)
    assert path.with_name("s.json").exists() is False
