"""Runs whose data, starting model and folder are in a bucket."""

import json

import jax
import numpy as np
import pytest
from tiny_run import arrays_of, losses, recipe_in, write_data, write_start

from pdrop_jax.paths import files_below
from pdrop_jax.train.loop import train


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


def test_everything_in_a_bucket(local, bucket):
    """Stopped, resumed and extended, it has the losses and the model of the local run."""
    upload(local / "data", bucket / "data")
    upload(local / "start", bucket / "start")
    everything = {
        "run_folder": f"{bucket}/run",
        "model_start": f"{bucket}/start",
        "data_conversations": f"{bucket}/data/data.json",
        "data_images": f"{bucket}/data/images",
    }
    train(recipe_in(local, run_steps=4, **everything))
    train(recipe_in(local, **everything), allow_changes=True)
    run = bucket / "run"
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["4", "6"]
    assert json.loads((run / "model" / "training.json").read_text())["step"] == 6
    assert not [name for name in files_below(bucket) if "pdrop" in name]
