"""``pdrop export`` of a run: finished or not, with adapters or without."""

import shutil
import subprocess

import jax
import numpy as np
import pytest
from command import PDROP
from tiny_run import CONFIG, recipe_in, write_data, write_start

from pdrop_jax import checkpoint
from pdrop_jax.cli.export import run as export
from pdrop_jax.errors import UserError
from pdrop_jax.train.loop import train
from pdrop_jax.train.stopping import StopRequest


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path / "data")
    write_start(tmp_path / "start")
    return tmp_path


def arrays(folder):
    return jax.tree.map(np.asarray, checkpoint.load(folder)[1])


def test_a_finished_run_is_its_model(folder, capsys):
    train(recipe_in(folder, run_steps=2))
    export(folder / "run", folder / "out", "pdrop", dtype="bfloat16", single_file=True)
    assert "has not finished" not in capsys.readouterr().out
    config, params = checkpoint.load(folder / "out", dtype="float32")
    assert config == CONFIG
    assert (folder / "out/params.safetensors").exists()
    expected = jax.tree.map(lambda x: np.asarray(x.astype("bfloat16"), np.float32), arrays(folder / "run/model"))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_adapters_of_a_run_that_goes_on_are_merged(folder, monkeypatch, capsys):
    recipe = recipe_in(folder, model_groups=("lora",), model_lora_rank=2, model_lora_alpha=4.0, run_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", lambda _, step: step == 3)
        train(recipe)
    export(folder / "run", folder / "out", "pdrop")
    assert "after 3 steps" in capsys.readouterr().out
    before, after = arrays(folder / "start"), arrays(folder / "out")
    assert jax.tree.structure(before) == jax.tree.structure(after)
    moved = np.abs(after["stages"]["1"]["attention"]["q"]["kernel"] - before["stages"]["1"]["attention"]["q"]["kernel"])
    assert moved.max() > 1e-4
    np.testing.assert_array_equal(after["embed"]["embedding"], before["embed"]["embedding"])
    assert not list((folder / "run").glob("tmp*"))


def test_a_model_older_than_the_newest_checkpoint_is_not_handed_out(folder, capsys):
    """As a run leaves it that was extended and killed before it wrote its model."""
    train(recipe_in(folder, run_steps=2))
    shutil.copytree(folder / "run/model", folder / "older")
    train(recipe_in(folder, run_steps=4), allow_changes=True)
    expected = arrays(folder / "run/model")
    shutil.rmtree(folder / "run/model")
    (folder / "older").rename(folder / "run/model")
    export(folder / "run", folder / "out", "pdrop")
    assert (
        f"the model in {folder}/run/model is older than the newest checkpoint: using the checkpoint after 4 steps"
        in capsys.readouterr().out
    )
    jax.tree.map(np.testing.assert_array_equal, arrays(folder / "out"), expected)
    assert checkpoint.training(folder / "out")["step"] == 4


def test_a_run_without_a_checkpoint(folder):
    (folder / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export(folder / "run", folder / "out", "hf")
    assert not (folder / "out").exists()


def test_from_the_command_line(folder):
    train(recipe_in(folder, run_steps=2))
    done = subprocess.run(
        [*PDROP, "export", folder / "run", folder / "out", "--format", "hf", "--single-file"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "pdrop export: --single-file requires --format pdrop\n"
