"""``pdrop tune``: calibrates the demo model as it is deployed, saves the schedule, and what it says of bad input."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from pdrop_jax.analysis.metrics import kl
from pdrop_jax.analysis.tune.calibrate import read_samples
from pdrop_jax.analysis.tune.search import Objective, _prefill
from pdrop_jax.checkpoint import load as load_checkpoint
from pdrop_jax.config import LlavaConfig
from pdrop_jax.eval.questions import read_questions
from pdrop_jax.generation.pretrained import DEMO, load, reschedule
from pdrop_jax.model.stacking import restage
from pdrop_jax.schedule import DropSchedule

GRIDS = pathlib.Path(__file__).parents[2] / "examples" / "grids"
SAMPLES = ("tune", "--samples", GRIDS / "questions.jsonl", "--images", GRIDS, "--limit", 2, "--batch-size", 2)
DEPLOYED = ("--quantize", "w4a4", "--quantize-cache", "int4")


def test_drops_are_allocated_and_saved(pdrop, tmp_path):
    out = tmp_path / "tuned"
    weights = ("--weights", 1, 1, 1, -1)
    done = pdrop(*SAMPLES, *DEPLOYED, "--keep", 0.5, *weights, "--out", out, "--json")
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    schedule = LlavaConfig.load(out).schedule
    assert DropSchedule.from_json(said["schedule"]) == schedule
    assert (schedule.score, schedule.weights) == ("quota", (1, 1, 1, -1))
    assert schedule.layers == (2, 3, 4, 5)
    ratios = np.array([1.0, *schedule.ratios])
    assert 2 * 1 + sum(schedule.ratios[:3]) + 3 * schedule.ratios[3] == pytest.approx(0.5 * 8, abs=1e-9)
    sensitivity, attention = np.array(said["sensitivity"]), np.array(said["attention"])
    assert sensitivity.argmin() == 0  # what both embed
    assert 0.05 < sensitivity[7] < 1
    assert ((attention > 0.2) & (attention < 1)).all()
    drops = -np.diff(ratios)
    assert (np.diff(drops[np.argsort(sensitivity[2:6])]) <= 1e-9).all()
    assert (said["samples"], said["image_tokens"], said["kl"]) == (2, 144, None)
    config, params = load_checkpoint(DEMO)
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(out)[1], restage(params, config, schedule))


def test_a_search_is_within_the_budget_and_no_worse_than_its_start(pdrop, tmp_path):
    out = tmp_path / "tuned"
    options = (
        "--score",
        "norm",
        "--layers",
        4,
        "--search",
        "--rounds",
        1,
        "--dtype",
        "float32",
        "--out",
        out,
        "--json",
    )
    done = pdrop(*SAMPLES, *DEPLOYED, "--keep", 0.7, *options)
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    schedule = LlavaConfig.load(out).schedule
    ((layer,), (ratio,)) = schedule.layers, schedule.ratios
    assert (layer + (8 - layer) * ratio) / 8 == pytest.approx(0.7, abs=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]

    # The value of a schedule, from the layers in front of its drop, is what the deployed model answers.
    exact, deployed = (
        load(dtype="float32", **options) for options in ({}, {"quantize": "w4a4", "quantize_cache": "int4"})
    )
    (sample,) = read_samples(deployed, read_questions(GRIDS / "questions.jsonl", GRIDS)[:2], 2)
    objective = Objective(exact, deployed, [sample], DropSchedule((), (), "dense", "norm"))

    def first_token(model, schedule):
        model = reschedule(model, schedule)
        return np.asarray(jax.nn.softmax(_prefill(model.config, model.params, sample.batch, 0)[0]))

    expected = kl(first_token(exact, DropSchedule.none()), first_token(deployed, schedule)).mean()
    assert said["kl"] == pytest.approx(expected, rel=1e-3)
    assert objective(schedule) == pytest.approx(said["kl"], rel=1e-6)
    start = dataclasses.replace(schedule, layers=(4,), ratios=((0.7 * 8 - 4) / 4,))
    assert said["kl"] <= objective(start)


@pytest.fixture
def without_pictures(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question_id": 1, "text": "Who?"}\n')
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one budget: --keep R, --macs N or --cache-bytes N"),
        (("--keep", 0.5, "--macs", 1e9), "give one budget"),
        (("--keep", 1), "--keep is a share of the image tokens between 0 and 1, got 1"),
        (("--keep", 0.5, "--quantize", "w3a3"), "invalid choice 'w3a3' for argument '--quantize'"),
        (("--keep", 0.5, "--layers", 8), "drop after layer 8 in a decoder of 8 layers"),
        (("--keep", 0.5, "--score", "nrom"), "unknown score 'nrom': did you mean 'norm'?"),
        (("--keep", 0.5, "--weights", 1, 1, 1, 1, "--score", "norm"), "weights are four finite numbers for the score"),
        (("--keep", 0.5, "--rounds", 0), "--rounds must be at least 1, got 0"),
        (("--keep", 0.1, "--layers", 4), "a budget of 14.4 average tokens cannot be met with drops after layers [4]"),
    ],
)
def test_bad_input(arguments, message, fails):
    assert message in fails(*SAMPLES, *arguments)


def test_samples_without_pictures(fails, without_pictures, tmp_path):
    assert "has no pictures: a schedule is calibrated on image tokens" in fails(
        "tune", "--samples", without_pictures, "--keep", 0.5, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()
