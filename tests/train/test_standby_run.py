"""Whole runs of a model with standby tokens, by the recipes of both stages: what they train, leave alone and resume."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_run import CONFIG, arrays_of, events, losses, recipe_in, stop_after, write_data, write_start

from pdrop_jax import checkpoint
from pdrop_jax.config import StandbyConfig
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.data.standby import views
from pdrop_jax.train.loop import train
from pdrop_jax.train.recipe import load_recipe

WITH_STANDBY = dataclasses.replace(
    CONFIG,
    text=dataclasses.replace(CONFIG.text, num_layers=2),
    schedule=DropSchedule((1,), (0.5,)),
    standby=StandbyConfig(8, temporal_layers=1, frames=2),
)


def run(folder, stage, start, name):
    """Six steps of a stage's groups and image mode, from the model in ``start``."""
    preset = load_recipe(f"standby-stage{stage}", ["model.start=s", "data.conversations=c", "run.folder=f"])
    changes = {"model_groups": preset.model.groups, "data_image_mode": preset.data.image_mode}
    changes["data_text_buckets"] = (64,)
    train(recipe_in(folder, model_start=str(start), run_folder=str(folder / name), **changes))
    return folder / name


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The folder of both runs, "stage1" and "stage2", and what each step of the second was given."""
    given = []

    def noted(*args):
        given.append(views(*args))
        return given[-1]

    folder = tmp_path_factory.mktemp("standby")
    write_data(folder / "data")
    write_start(folder / "start", WITH_STANDBY)
    first = run(folder, 1, folder / "start", "stage1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pdrop_jax.train.loop.views", noted)
        run(folder, 2, first / "model", "stage2")
    return folder, given


def test_stage_1_trains_the_new_arrays_and_leaves_all_others_as_they_were(stages):
    stages, _ = stages
    begun = checkpoint.load(stages / "start")[1]
    config, trained = checkpoint.load(stages / "stage1/model")
    assert config == WITH_STANDBY
    jax.tree.map(
        np.testing.assert_array_equal,
        {name: x for name, x in begun.items() if name != "standby"},
        {name: x for name, x in trained.items() if name != "standby"},
    )
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), begun["standby"], trained["standby"])
    assert moved["tokens"]["embedding"]
    assert all(jax.tree.leaves([moved["mlps"], moved["projector"]]))
    logged = [loss for _, loss in losses(stages / "stage1")]
    assert logged[-1] < logged[0]


def test_stage_2_trains_on_both_modes(stages):
    """Each step has the same pictures and targets in both, and every group is trained."""
    stages, given = stages
    assert len(given) == 6
    for focus, standby in given:
        assert standby.bucket.images == (0,) * len(focus.bucket.images)
        np.testing.assert_array_equal(focus.crops, standby.crops)
        assert (focus.labels >= 0).sum() == (standby.labels >= 0).sum() > 0
    assert sum((focus.image_id > 0).sum() for focus, _ in given) == 16 * 16  # two rows in three have a picture
    config, trained = checkpoint.load(stages / "stage2/model")
    assert config == WITH_STANDBY
    before = checkpoint.load(stages / "stage1/model")[1]
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, trained)
    for name in ("vision", "standby", "projector", "stages"):
        assert any(jax.tree.leaves(moved[name])), name
    assert [step for name, step in events(stages / "stage2") if name == "saved"] == [2, 4, 6]
    logged = losses(stages / "stage2")
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[-1][1] < logged[0][1]


def test_a_stopped_run_of_both_modes_goes_on_as_if_it_had_not_been(stages, monkeypatch):
    stages, _ = stages
    start = stages / "stage1/model"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run(stages, 2, start, "again")
    assert losses(stages / "again") == losses(stages / "stage2")[:3]
    assert not (stages / "again/model").exists()
    run(stages, 2, start, "again")
    assert losses(stages / "again") == losses(stages / "stage2")
    jax.tree.map(np.testing.assert_array_equal, arrays_of(stages / "again"), arrays_of(stages / "stage2"))
