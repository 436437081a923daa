"""``pdrop tune --search``, interrupted and run again: it goes on where it was and finds the same schedule."""

import json
import signal

import numpy as np
import pytest
from command import Forked, wait_for_lines
from PIL import Image
from tiny_run import write_start

from pdrop_jax import checkpoint
from pdrop_jax.analysis.tune.search import Objective
from pdrop_jax.config import LlavaConfig

SEARCH = ("--keep", 0.6, "--layers", 1, 2, "--score", "norm", "--search", "--rounds", 1, "--dtype", "float32", "--json")


@pytest.fixture
def command(tmp_path):
    write_start(tmp_path / "model")
    lines = []
    for n, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (2, 30, 30, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        lines.append(json.dumps({"question_id": n, "text": f"What is in {n}?", "image": f"{n}.png"}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    return ("tune", tmp_path / "model", "--samples", tmp_path / "q.jsonl", "--images", tmp_path, *SEARCH, "--out")


@pytest.fixture
def evaluated(monkeypatch):
    """The schedules that the model has been run with."""
    found, call = [], Objective.__call__

    def counted(self, schedule):
        found.append(schedule)
        return call(self, schedule)

    monkeypatch.setattr(Objective, "__call__", counted)
    return found


def test_it_goes_on_where_it_was(pdrop, command, evaluated, tmp_path):
    """After Ctrl-C in a process of its own, and after a kill, which may leave half a line."""
    out, kept = tmp_path / "out", tmp_path / "out.search.unfinished"
    process = Forked(*command, out)
    wait_for_lines(process, kept, 2)
    process.send_signal(signal.SIGINT)
    (said,) = (line for line in process.finish(130).splitlines() if line.startswith("pdrop"))
    assert said == f"pdrop tune: interrupted; run the same command to resume from {kept}"
    known = kept.read_bytes().count(b"\n")
    assert not out.exists()
    with kept.open("ab") as file:
        file.write(b'{"answer_id": "torn')

    done = pdrop(*command, out)
    assert done.code == 0, done.stderr
    resumed = list(evaluated)
    assert not kept.exists()
    evaluated.clear()
    whole = pdrop(*command, tmp_path / "whole")
    assert known + len(resumed) == len(evaluated) == len(set(evaluated))
    assert 2 <= known < len(evaluated)
    assert resumed == evaluated[known:]
    assert json.loads(done.stdout) == json.loads(whole.stdout)
    assert LlavaConfig.load(out).schedule == LlavaConfig.load(tmp_path / "whole").schedule


def test_an_interruption_before_anything_is_known_names_no_file(pdrop, command, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pdrop_jax.analysis.tune.tune.calibrate", interrupt)
    done = pdrop(*command, tmp_path / "out")
    assert (done.code, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "pdrop tune: interrupted"
    assert not list(tmp_path.glob("out*"))


def test_an_interruption_while_the_model_is_written_keeps_the_search(pdrop, command, evaluated, monkeypatch, tmp_path):
    save = checkpoint.save

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(checkpoint, "save", interrupt)
    done = pdrop(*command, out)
    assert done.code == 130
    assert done.stderr.splitlines()[-1].endswith(f"run the same command to resume from {out}.search.unfinished")
    count = len(evaluated)
    monkeypatch.setattr(checkpoint, "save", save)
    assert pdrop(*command, out).code == 0
    assert len(evaluated) == count > 0
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
