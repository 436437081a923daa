"""Runs whose data, starting model and folder are in a bucket."""

import dataclasses
import json
import os
import socket
import sys
import time

import jax
import numpy as np
import pytest
from command import Forked
from tiny_run import arrays_of, lines_of, losses, recipe_in, write_data, write_start

from pdrop_jax.errors import UserError
from pdrop_jax.paths import as_path, files_below
from pdrop_jax.train.checkpoints import Checkpoints
from pdrop_jax.train.loop import train
from pdrop_jax.train.recipe import RunRecipe
from pdrop_jax.train.stopping import StopRequest


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A local run with its data and its starting model."""
    folder = tmp_path_factory.mktemp("local")
    write_data(folder / "data")
    write_start(folder / "start")
    train(recipe_in(folder))
    return folder


def upload(folder, target):
    for name in files_below(folder):
        (target / name).upload(folder / name)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, arrays_of(one), arrays_of(other))


def test_everything_in_a_bucket(local, name, monkeypatch):
    """Stopped and resumed, it has the losses and the model of the local run."""
    bucket = as_path(f"s3://{name}")
    upload(local / "data", bucket / "data")
    upload(local / "start", bucket / "start")
    everything = {
        "run_folder": f"{bucket}/run",
        "model_start": f"{bucket}/start",
        "data_conversations": f"{bucket}/data/data.json",
        "data_images": f"{bucket}/data/images",
    }
    run = bucket / "run"
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", lambda _, step: step == 3)
        train(recipe_in(local, **everything))
    assert losses(run) == losses(local / "run")[:3]
    train(recipe_in(local, **everything))
    assert losses(run) == losses(local / "run")
    same(run, local / "run")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["4", "6"]
    assert json.loads((run / "model" / "training.json").read_text())["step"] == 6
    damage_the_newest(run)
    assert not [name for name in files_below(bucket) if "pdrop" in name]


def damage_the_newest(run):
    """The checkpoint is moved out of the way, and the one before is taken."""
    (run / "checkpoints" / "6" / "about" / "_METADATA").write_text("{}")
    size = files_below(run / "checkpoints" / "6")

    def stop(saved):
        raise UserError(f"the checkpoint of step {saved.step} is taken")

    with (
        Checkpoints(run, RunRecipe(str(run))) as checkpoints,
        pytest.raises(UserError, match="the checkpoint of step 4 is taken"),
    ):
        checkpoints.restore(stop)
    assert files_below(run / "damaged-6") == size
    assert not (run / "checkpoints" / "6").exists()


def begin_two(recipe, folder):
    """Two processes that are one run and share nothing but its bucket: each has folders of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for number in range(2):
        own = folder / str(number)
        (own / "temporary").mkdir(parents=True, exist_ok=True)
        (own / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))
        together = ("--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", str(number))
        environment = os.environ | {
            "TMPDIR": str(own / "temporary"),
            "JAX_COMPILATION_CACHE_DIR": f"{as_path(recipe.run.folder).bucket}/compiled",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        processes.append(Forked("train", "recipe.json", *together, cwd=own, env=environment))
    return processes


def test_two_processes_without_a_shared_disk_are_killed_while_they_save(local, name, tmp_path):
    run = as_path(f"gs://{name}/run")
    recipe = recipe_in(local, run_folder=str(run))
    pair = begin_two(recipe, tmp_path)
    while not list((run / "checkpoints").glob("*")):  # a save has begun
        assert all(process.poll() is None for process in pair), [process.stderr for process in pair]
        time.sleep(0.01)
    for process in pair:
        process.kill()
    assert not (run / "model").exists()
    for process in begin_two(recipe, tmp_path):
        process.finish()
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]
    assert [line["cached"] for line in lines_of(run) if line.get("event") == "compiled"][-1]  # in the bucket
    alone, together = ([loss for _, loss in losses(folder)] for folder in (local / "run", run))
    np.testing.assert_allclose(alone, together, rtol=1e-5)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["4", "6"]
