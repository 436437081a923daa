"""Runs in processes of their own that are killed, told to end, starved of disk, or share the work."""

import dataclasses
import json
import os
import random
import resource
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from command import PDROP
from tiny_run import arrays_of, events, losses, recipe_in, write_data, write_start

KILLS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder / "data")
    write_start(folder / "start")
    return folder


def begin(folder, name, *options, limit=None, **changes):
    """``pdrop train`` in ``folder``/name. Compiled programs are kept between processes."""
    recipe = recipe_in(folder, run_folder=str(folder / name), **changes)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(dataclasses.asdict(recipe)))
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def no_larger_file():
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [*PDROP, "train", path, *options], stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=no_larger_file
    )


def finish(process, code=0):
    said = process.communicate(timeout=300)[1]
    assert process.returncode == code, said
    return said


def lines_of(run):
    try:
        return len((run / "log.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, arrays_of(one), arrays_of(other))


def test_a_run_that_is_killed_twenty_times_ends_the_same(folder):
    """Killed at a random moment of a step or as soon as a save has begun, wherever the run then is."""
    recipe = {"run_steps": 120, "run_save_every": 3}
    finish(begin(folder, "whole", **recipe))
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
        process.communicate()
        if process.returncode != -signal.SIGKILL:  # it came to its end first
            assert not process.returncode
            break
        kills += 1
        while_saving += any(run.glob("checkpoints/*tmp*"))
    assert kills == KILLS
    assert while_saving >= 5
    said = finish(begin(folder, "killed", **recipe))
    assert "is damaged" not in said
    assert losses(run) == losses(folder / "whole")
    same(run, folder / "whole")


def test_a_run_that_is_told_to_end_saves_and_goes_on(folder):
    recipe = {"run_steps": 60, "run_save_every": 50}
    finish(begin(folder, "untold", **recipe))
    process = begin(folder, "told", **recipe)
    while lines_of(folder / "told") < 10:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert "the same command goes on" in said
    last = losses(folder / "told")[-1][0]
    assert ("saved", last) in events(folder / "told")
    assert last < 60
    said = finish(begin(folder, "told", **recipe))
    assert f"resumed     after {last} steps" in said
    assert losses(folder / "told") == losses(folder / "untold")
    same(folder / "told", folder / "untold")


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(folder):
    recipe = {"run_steps": 6, "run_save_every": 2}
    finish(begin(folder, "roomy", **recipe))
    process = begin(folder, "full", **recipe)
    while not (folder / "full/checkpoints/2").exists():
        time.sleep(0.001)
    process.kill()
    process.communicate()
    said = finish(begin(folder, "full", limit=100_000, **recipe), code=2)
    assert len([line for line in said.splitlines() if line.startswith("pdrop train:")]) == 1
    assert "Traceback" not in said
    assert "cannot be written" in said
    assert "make room and run again" in said
    assert (folder / "full/checkpoints/2").exists()
    finish(begin(folder, "full", **recipe))
    assert losses(folder / "full") == losses(folder / "roomy")
    same(folder / "full", folder / "roomy")


def test_two_processes_are_one_with_the_same_batch(folder):
    finish(begin(folder, "one", run_accumulate=2))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id"]
    for process in [begin(folder, "two", *together, str(number), run_accumulate=2) for number in range(2)]:
        finish(process)
    one, two = losses(folder / "one"), losses(folder / "two")
    assert [step for step, _ in one] == [step for step, _ in two]
    np.testing.assert_allclose([loss for _, loss in one], [loss for _, loss in two], rtol=1e-5)
    finish(begin(folder, "two", run_accumulate=2))  # and goes on as one: it has nothing left to do
