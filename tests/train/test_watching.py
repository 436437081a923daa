"""A run that can be watched: the fields of its log, validation, a benchmark, TensorBoard, W&B, a profile, warnings."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import (
    CONFIG,
    QUESTIONS,
    TIMES,
    arrays_of,
    evaluation_in,
    lines_of,
    recipe_in,
    scalars,
    stop_after,
    wandb_history,
    write_data,
    write_questions,
    write_start,
)

import pdrop_jax
from pdrop_jax.errors import UserError
from pdrop_jax.eval.scoring import score_gqa
from pdrop_jax.inputs import assemble
from pdrop_jax.model.loss import compute_loss, count_targets
from pdrop_jax.train.data.pipeline import open_dataset
from pdrop_jax.train.loop import train
from pdrop_jax.train.tracing import parse_range

# Every field of a step's line: its type, smallest and largest value.
STEP = {
    "step": (int, 1, 6),
    "loss": (float, 0.0, 50.0),
    "grad_norm": (float, 0.0, 1e4),
    "learning_rate": (float, 0.0, 1e-2),
    "targets": (int, 20, 20),
    "tokens": (int, 4 * 20, 4 * 64),
    "pictures": (int, 0, 4),
    "skipped": (int, 0, 0),
    "invalid": (dict, None, None),
    "macs": (float, 1e6, 1e9),
    **dict.fromkeys(TIMES, (float, 0.0, 1000000.0)),
}
EVENTS = {
    "compiled": {"text": int, "images": list, "seconds": float, "cached": bool},
    "saved": {},
    "validation": {"validation_loss": float, "validation_targets": int, "seconds": float},
    "evaluation": {"gqa_accuracy": float, "seconds": float},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    write_data(folder / "data")
    write_data(folder / "val", rows=9)
    write_start(folder / "start")
    write_questions(folder)
    return folder


def watched(folder, name, **changes):
    """A recipe with everything that can be watched, every third step."""
    return recipe_in(
        folder,
        **{
            "run_folder": str(folder / name),
            "validation_conversations": str(folder / "val/data.json"),
            "validation_every": 3,
            **evaluation_in(folder),
            "evaluation_every": 3,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def whole(folder):
    """The folder of a run of six steps that nothing interrupted, and what it said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        train(watched(folder, "whole", log_wandb="pyramids"), profile=(4, 5))
    return folder / "whole"


def test_every_field_of_the_log(whole):
    steps = [line for line in lines_of(whole) if "event" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert list(line) == list(STEP)
        for name, (kind, least, most) in STEP.items():
            assert type(line[name]) is kind, name
            assert kind is dict or least <= line[name] <= most, name
        assert line["data_seconds"] + line["compute_seconds"] <= line["seconds"] * 1.000001
    assert sum(line["pictures"] for line in steps) == 16  # one epoch: one row in three has no picture
    events = [line for line in lines_of(whole) if "event" in line]
    assert {line["event"] for line in events} == set(EVENTS)
    for line in events:
        fields = EVENTS[line["event"]]
        assert list(line) == ["event", "step", *fields]
        assert all(type(line[name]) is kind for name, kind in fields.items()), line
    assert [line["step"] for line in events if line["event"] == "validation"] == [3, 6]
    assert [line["step"] for line in events if line["event"] == "evaluation"] == [3, 6]


def test_the_validation_loss_is_that_of_the_model(whole, folder):
    """Each row alone, in another shape, with the parameters that the run wrote."""
    recipe = watched(folder, "whole")
    data = dataclasses.replace(recipe.data, conversations=str(folder / "val/data.json"))
    rows = open_dataset(data, CONFIG, folder / "start")
    chosen = np.concatenate([planned.rows for planned in rows.plan_epoch(4, 0, 0)])
    loss = jax.jit(lambda params, batch: compute_loss(CONFIG, params, batch)[0])
    params, total, targets = arrays_of(whole), 0.0, 0
    for number in chosen.tolist():
        batch = assemble([rows.row(number)[0]], CONFIG, rows.plan_epoch(1, 0, 0)[0].bucket, 1)
        total += float(loss(params, batch))
        targets += int(count_targets(batch.labels))
    line = [line for line in lines_of(whole) if line.get("event") == "validation"][-1]
    assert (len(chosen), targets) == (8, line["validation_targets"])
    assert line["validation_loss"] == pytest.approx(total / targets, rel=1e-5)


def test_the_answers_are_those_of_the_model(whole, folder):
    answers = [json.loads(line) for line in (whole / "evaluation/6.jsonl").read_text().splitlines()]
    model = pdrop_jax.load(whole / "model")
    images = [folder / f"data/images/{n % 5}.png" for n in range(QUESTIONS)]
    texts = pdrop_jax.generate(model, ["What?"] * QUESTIONS, images, pdrop_jax.Sampling(max_new_tokens=4)).texts
    assert [answer["text"] for answer in answers] == texts
    line = [line for line in lines_of(whole) if line.get("event") == "evaluation"][-1]
    report = score_gqa(whole / "evaluation/6.jsonl", folder / "gqa.json")
    assert line["gqa_accuracy"] == report.values["accuracy"]


def test_watching_changes_no_bit(whole, folder):
    train(recipe_in(folder, run_folder=str(folder / "unwatched")))
    jax.tree.map(np.testing.assert_array_equal, arrays_of(folder / "unwatched"), arrays_of(whole))
    own = [line for line in scalars(whole) if line.get("event") not in ("validation", "evaluation")]
    assert scalars(folder / "unwatched") == own


@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_run_has_the_same_lines(whole, folder, monkeypatch, step):
    """Also if it was stopped where a validation is due, which it then makes up for."""
    name = f"stopped-{step}"
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        train(watched(folder, name))
    assert ("validation" in {line.get("event") for line in lines_of(folder / name)}) == (step > 3)
    train(watched(folder, name))
    found = [line for line in scalars(folder / name) if line != {"event": "saved", "step": 3}]
    assert found == scalars(whole)


def test_a_killed_run_makes_up_for_its_validation(whole, folder):
    """Killed between the last checkpoint and its validation."""
    shutil.copytree(whole, folder / "killed")
    log = folder / "killed/log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines) if '"validation"' in line and '"step": 6' in line)
    log.write_text("".join(lines[:cut]))
    train(watched(folder, "killed"))
    assert scalars(folder / "killed") == scalars(whole)


def test_tensorboard_has_what_the_log_has(whole):
    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    shown = {
        (tag, e.step): float(e.tensor_proto.float_val[0]) for tag in board.Tags()["tensors"] for e in board.Tensors(tag)
    }
    logged = {
        (name, line["step"]): np.float32(value)
        for line in lines_of(whole)
        if line.get("event") not in ("compiled", "saved")
        for name, value in line.items()
        if isinstance(value, float | int) and name != "step" and not (name == "seconds" and "event" in line)
    }
    assert shown == logged


def test_a_resumed_run_is_one_run_of_wandb(whole, folder, monkeypatch):
    """Offline, read from W&B's own files."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(watched(folder, "wandb", log_wandb="pyramids"))
    train(watched(folder, "wandb", log_wandb="pyramids"))
    one, two = (wandb_history(folder / name) for name in ("whole", "wandb"))
    assert len(one) == 1
    assert len(two) == 1
    (project, expected), (_, found) = *one.values(), *two.values()
    assert project == "pyramids"
    assert [line["step"] for line in expected if "loss" in line] == [1, 2, 3, 4, 5, 6]
    names = ("loss", "grad_norm", "learning_rate", "pictures", "validation_loss", "gqa_accuracy")
    for name in names:
        values = [[(line["step"], line[name]) for line in lines if name in line] for lines in (expected, found)]
        assert values[0] == values[1]
        assert values[0] == [(line["step"], line[name]) for line in lines_of(whole) if name in line]


def test_a_profile_of_some_steps(whole, folder):
    (trace,) = (whole / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert b"train" in content
    assert len(content) > 1000
    with pytest.raises(UserError, match=r"--profile 7:8: this run has the steps 1 to 6 left to run"):
        train(recipe_in(folder, run_folder=str(folder / "profiled")), profile=(7, 8))
    with pytest.raises(UserError, match=r"--profile 1:2: this run has no steps left to run"):
        train(watched(folder, "whole"), profile=(1, 2))


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "0:3", "4:3", "a:b", "1:2:3", "-1:3", "1:9999999999", "²:3"])
def test_ranges_that_cannot_be_profiled(text):
    with pytest.raises(UserError, match=r"expected the first and the last step to profile, such as 10:12"):
        parse_range(text)


def test_what_a_run_without_a_terminal_says(whole, folder, capfd):
    train(watched(folder, "spoken", log_print_every=4))
    said = capfd.readouterr().err.splitlines()
    rate = r"[\d,]+ tokens/s, [\d,.]+ pictures/s"
    patterns = [
        r"compiling   training step for 48 text \+ 16 image slots …",
        r"compiling   training step for 48 text \+ 16 image slots: [\d.]+ s, (compiled|read from the compilation.*)",
        rf"step 1/6: loss 6\.\d+, gradient norm [\d.]+, {rate}, waiting for data \d+%, .* left",
        r"validation  step 3: validation loss [\d.]+, validation targets 40 \([\d.]+ s\)",
        r"evaluation  step 3: gqa accuracy [\d.]+ \([\d.]+ s\)",
        rf"step 4/6: loss [\d.]+, gradient norm [\d.]+, {rate}, waiting for data \d+%, .* left",
        rf"step 6/6: loss [\d.]+, gradient norm [\d.]+, {rate}, waiting for data \d+%, .* left",
        r"validation  step 6: .*",
        r"evaluation  step 6: .*",
        r"time        .* for 6 steps: computing \d+%, .*compiling \d+%.*",
        rf"speed       {rate}",
        r"programs    \d+ compiled, \d+ read from the compilation cache.*",
        rf"{re.escape(str(folder))}/spoken/model: trained for 6 steps",
    ]
    assert len(said) == 6 + len(patterns)  # after the summary of the job
    for line, pattern in zip(said[6:], patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_conversations": "nowhere.json"}, "nowhere.json cannot be read: there is no such file"),
        ({"validation_images": "nowhere"}, "data.images is nowhere, which is not a folder"),
        ({"evaluation_questions": "nowhere.jsonl"}, "nowhere.jsonl cannot be read: there is no such file"),
        ({"evaluation_images": "nowhere"}, "6 pictures are not there: nowhere/0.png"),
        ({"evaluation_annotations": None}, "must be given together: set all three or none"),
        ({"evaluation_benchmark": "vqav2"}, "gqa.json is malformed"),
        ({"evaluation_max_new_tokens": 4096}, "question 0"),
        ({"run_batch_size": 12}, "9 usable rows, but the batch size is 12"),
        ({"log_wandb": "a/b/c"}, "log.wandb is 'a/b/c', it must"),
    ],
)
def test_checks_that_cannot_be_made(folder, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        train(watched(folder, "refused", **changes))
    assert "\n" not in str(error.value)
    assert not (folder / "refused").exists()
