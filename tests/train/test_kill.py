"""Runs in processes of their own that are killed, told to end, starved of disk, or share the work."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from command import PDROP, Forked
from tiny_run import (
    arrays_of,
    evaluation_in,
    events,
    losses,
    recipe_in,
    scalars,
    write_data,
    write_questions,
    write_start,
)

from pdrop_jax import checkpoint
from pdrop_jax.train.data.pack import pack
from pdrop_jax.train.data.sources.open_source import open_source
from pdrop_jax.train.recipe import SourceRecipe
from pdrop_jax.train.result import model_of

KILLS = 10
SAID = ["data", "steps", "parameters", "shapes", "slots", "cost"]  # first words of what a run says before it begins
DEAD_SECONDS = 150  # within which a process notices that another has died; jax misses its heartbeats after 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder / "data")
    write_start(folder / "start")
    return folder


def prepared(folder, name, devices=1, **changes):
    """Arguments and environment of ``pdrop train`` in ``folder``/name. Compiled programs are kept between processes."""
    recipe = recipe_in(folder, run_folder=str(folder / name), **changes)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(dataclasses.asdict(recipe)))
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    return ("train", path), environment


def begin(folder, name, *options, limit=None, **changes):
    arguments, environment = prepared(folder, name, **changes)
    return Forked(*arguments, *options, env=environment, largest_file=limit)


def lines_of(run):
    try:
        return len((run / "log.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, arrays_of(one), arrays_of(other))


def test_a_run_that_is_killed_ten_times_ends_the_same(folder):
    """Killed at a random moment of a step or as soon as a save has begun, wherever the run then is.

    It is trained on a mixture of two formats, which must go on with the rows that are due.
    """
    data, images, packed = str(folder / "data/data.json"), str(folder / "data/images"), str(folder / "packed")
    pack(open_source(data, images), packed, records_per_shard=5)
    sources = (SourceRecipe(data, images, 2.0), SourceRecipe(packed, None, 1.0))
    mixture = {"data_conversations": None, "data_images": None, "data_sources": sources}
    validation = {"validation_conversations": data, "validation_images": images, "validation_every": 15}
    recipe = {"run_steps": 60, "run_save_every": 3, **mixture, **validation}
    arguments, environment = prepared(folder, "whole", **recipe)
    subprocess.run([*PDROP, *arguments], env=environment, check=True)  # a process of its own from start to end
    rng = random.Random(0)
    run, kills, while_saving = folder / "killed", 0, 0
    while kills < KILLS:
        process = begin(folder, "killed", **recipe)
        known, wanted, in_save = lines_of(run), rng.randrange(1, 7), kills % 2
        while lines_of(run) < known + wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        while in_save and process.poll() is None and not any(run.glob("checkpoints/*tmp*")):
            time.sleep(0.0005)
        process.kill()
        if process.returncode != -signal.SIGKILL:  # it came to its end first
            assert not process.returncode
            break
        kills += 1
        while_saving += any(run.glob("checkpoints/*tmp*"))
    assert kills == KILLS
    assert while_saving >= 3
    said = begin(folder, "killed", **recipe).finish()
    assert "is damaged" not in said
    assert "programs    0 compiled, " in said  # a restarted run finds all of them in the cache
    assert scalars(run) == scalars(folder / "whole")
    assert len([line for line in scalars(run) if line.get("event") == "validation"]) == 4
    same(run, folder / "whole")


def test_an_extended_run_that_is_killed_at_its_end_has_the_model_of_its_last_step(folder, tmp_path):
    """Killed once at each of these moments, the last of a run, always by the same command."""
    run, expected = folder / "extended", tmp_path / "expected"
    begin(folder, "extended", run_steps=4).finish()
    longer, kills = functools.partial(begin, folder, "extended", "--allow-changes", run_steps=6), 0
    for moment in ("checkpoints/6", ".model.new.unfinished/params", ".model.new.unfinished/training.json"):
        process = longer()
        while not (run / moment).exists() and process.poll() is None:
            time.sleep(0.0005)
        process.kill()
        kills += process.returncode == -signal.SIGKILL
        if not expected.exists():
            assert checkpoint.training(run / "model")["step"] == 4
            shutil.copytree(model_of(run, tmp_path), expected / "model")  # of checkpoint 6
        model = arrays_of(run)  # whole, whichever it is
        if checkpoint.training(run / "model")["step"] == 6:  # it had its name already
            jax.tree.map(np.testing.assert_array_equal, model, arrays_of(expected))
    assert kills >= 2
    assert f"{run}/model: trained for 6 steps" in longer().finish()
    assert checkpoint.training(run / "model")["step"] == 6
    same(run, expected)


def in_session(leader):
    """The processes of a session that run, by number, but for its leader."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, _group, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.add(int(path.parent.name))
    return found - {leader}


@pytest.mark.parametrize(("moment", "seconds"), [("while they start", 60), ("while they read", 10)])
def test_workers_end_with_a_run_that_is_killed(folder, moment, seconds):
    """One that starts imports jax before it can look."""
    process = begin(folder, f"orphans {moment}", data_workers=2, run_steps=10_000)
    run = folder / f"orphans {moment}"
    while len(in_session(process.pid)) < 2 or (moment == "while they read" and lines_of(run) < 3):
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.kill()
    killed = time.monotonic()
    while in_session(process.pid) and time.monotonic() < killed + seconds:
        time.sleep(0.05)
    assert not in_session(process.pid)


def test_a_run_that_is_told_to_end_saves_and_goes_on(folder):
    recipe = {"run_steps": 60, "run_save_every": 50}
    begin(folder, "untold", **recipe).finish()
    process = begin(folder, "told", **recipe)
    while lines_of(folder / "told") < 10:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.finish()
    assert "run the same command to resume" in said
    last = losses(folder / "told")[-1][0]
    assert ("saved", last) in events(folder / "told")
    assert last < 60
    said = begin(folder, "told", **recipe).finish()
    assert f"resumed     after {last} steps" in said
    assert losses(folder / "told") == losses(folder / "untold")
    same(folder / "told", folder / "untold")


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(folder):
    recipe = {"run_steps": 6, "run_save_every": 2}
    begin(folder, "roomy", **recipe).finish()
    process = begin(folder, "full", **recipe)
    while not (folder / "full/checkpoints/2").exists():
        time.sleep(0.001)
    process.kill()
    said = begin(folder, "full", limit=100_000, **recipe).finish(2)
    assert len([line for line in said.splitlines() if line.startswith("pdrop train:")]) == 1
    assert "Traceback" not in said
    words = [line.split()[0] for line in said.splitlines()]
    steps = ["step"] * words.count("step")
    assert words == [*SAID, "resumed", "compiling", "compiling", *steps, "pdrop"]  # no word of anybody else
    assert "cannot be written" in said
    assert "free disk space and run the same command again" in said
    assert (folder / "full/checkpoints/2").exists()
    begin(folder, "full", **recipe).finish()
    assert losses(folder / "full") == losses(folder / "roomy")
    same(folder / "full", folder / "roomy")


def begin_two(folder, name, **changes):
    """Two processes that are one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id"]
    return [begin(folder, name, *together, str(number), **changes) for number in range(2)]


def test_two_processes_are_one_with_the_same_batch(folder):
    write_questions(folder)
    checks = {"validation_conversations": str(folder / "data/data.json"), **evaluation_in(folder)}
    begin(folder, "one", run_grad_accum_steps=2, **checks).finish()
    for process in begin_two(folder, "two", run_grad_accum_steps=2, **checks):
        process.finish()
    one, two = losses(folder / "one"), losses(folder / "two")
    assert [step for step, _ in one] == [step for step, _ in two]
    np.testing.assert_allclose([loss for _, loss in one], [loss for _, loss in two], rtol=1e-5)
    names = ("validation_loss", "validation_targets", "gqa_accuracy")
    results = [{n: x[n] for x in scalars(folder / run) for n in names if n in x} for run in ("one", "two")]
    assert set(results[0]) == set(names)
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    answers = [(folder / run / "evaluation/6.jsonl").read_text() for run in ("one", "two")]
    assert answers[0] == answers[1]
    begin(folder, "two", run_grad_accum_steps=2).finish()  # and goes on as one: it has nothing left to do


def test_one_of_two_processes_dies(folder):
    """The other ends too; both go on, then one alone; the losses are those of a run on one device."""
    recipe = {"run_batch_size": 8, "run_steps": 30, "run_grad_accum_steps": 1, "optimizer_eps": 1e-2}
    run = folder / "pair"

    def both_until(step):
        pair = begin_two(folder, "pair", devices=2, **recipe)
        while ((lines_of(run) and losses(run)) or [(0, 0)])[-1][0] < step and all(x.poll() is None for x in pair):
            time.sleep(0.01)
        return pair

    begin(folder, "alone", **recipe).finish()
    first, second = both_until(4)
    second.kill()
    first.wait(DEAD_SECONDS)
    # A broken collective is ours to report; where a process waits for another in jax or orbax, jax aborts it.
    ends = {1: "has another process died?", -signal.SIGABRT: "another task died"}
    assert ends[first.returncode] in first.stderr, first.stderr
    assert not (run / "model").exists()
    for process in (pair := both_until(10)):
        process.send_signal(signal.SIGTERM)
    for process in pair:
        process.finish()
    assert 10 <= losses(run)[-1][0] < 30
    begin(folder, "pair", **recipe).finish()
    alone, pair = losses(folder / "alone"), losses(run)
    assert [step for step, _ in alone] == [step for step, _ in pair] == list(range(1, 31))
    np.testing.assert_allclose([loss for _, loss in alone], [loss for _, loss in pair], rtol=1e-4)
