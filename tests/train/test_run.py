"""Whole runs: what they write, how they resume, what they refuse."""

import dataclasses
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from tiny_run import (
    CONFIG,
    arrays_of,
    compiled_in,
    events,
    losses,
    recipe_in,
    stop_after,
    write_data,
    write_start,
)

from pdrop_jax import checkpoint
from pdrop_jax.config import LlavaConfig, Tiling
from pdrop_jax.errors import UserError
from pdrop_jax.model.params import init_params
from pdrop_jax.model.placement import abstract
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.checkpoints import Checkpoints, Trained
from pdrop_jax.train.loop import open_job, train
from pdrop_jax.train.model import write_model
from pdrop_jax.train.step import changing, train_step


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_data(folder / "data")
    write_start(folder / "start")
    return folder


@pytest.fixture
def folder(parts, tmp_path):
    for name in ("data", "start"):
        (tmp_path / name).symlink_to(parts / name)
    return tmp_path


@pytest.fixture(scope="module")
def whole(parts):
    """The folder of a run of six steps that nothing interrupted."""
    train(recipe_in(parts))
    return parts / "run"


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, arrays_of(one), arrays_of(other))


def test_a_run_leaves_a_model_a_log_and_checkpoints(whole):
    logged = losses(whole)
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[-1][1] < 0.6 * logged[0][1]
    assert {name for name, _ in events(whole)} == {"compiled", "saved"}
    assert [step for name, step in events(whole) if name == "saved"] == [2, 4, 6]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["4", "6"]
    config, params = checkpoint.load(whole / "model")
    assert config == CONFIG
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert (whole / "model/tokenizer.json").exists()


def test_what_the_log_says_of_a_step(whole):
    line = json.loads((whole / "log.jsonl").read_text().splitlines()[-2])
    assert line["step"] == 6
    assert line["targets"] == 4 * 5  # an answer comes in letters
    assert line["skipped"] == 0
    assert line["invalid"] == {}
    assert 0 < line["learning_rate"] < 1e-2
    assert line["tokens_per_second"] == pytest.approx(line["tokens"] / (line["data_seconds"] + line["compute_seconds"]))


def test_a_finished_run_is_left_alone(whole, parts):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.suffix != ".jsonl"}
    log = (whole / "log.jsonl").read_text()
    train(recipe_in(parts))
    assert (whole / "log.jsonl").read_text() == log
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(folder, whole, monkeypatch, steps):
    recipe = recipe_in(folder)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        train(recipe)
    assert losses(folder / "run") == losses(whole)[:steps]
    assert not (folder / "run/model").exists()
    train(recipe)
    assert losses(folder / "run") == losses(whole)
    same(folder / "run", whole)


def test_a_log_ahead_of_the_checkpoint_is_cut(folder, whole):
    shutil.copytree(whole, folder / "run")
    shutil.rmtree(folder / "run/model")
    shutil.rmtree(folder / "run/checkpoints/6")
    with (folder / "run/log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    train(recipe_in(folder))
    assert losses(folder / "run") == losses(whole)
    same(folder / "run", whole)


def damage(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])


@pytest.fixture(scope="module")
def state(parts):
    """What a checkpoint of the runs here contains."""
    job, params, _ = open_job(recipe_in(parts))
    return abstract(job.config, changing(jax.eval_shape(job.init, params)), job.mesh)


@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, whole, state, capsys, how):
    def restored(run):
        with Checkpoints(run, recipe_in(folder).run) as checkpoints:
            metadata, arrays = checkpoints.restore(lambda _: state)
        return metadata.step, arrays

    sizes = {path: path.stat().st_size for path in (whole / "checkpoints/6").rglob("*") if path.is_file()}
    files = sorted((size, path.relative_to(whole)) for path, size in sizes.items() if size > 1)
    *_, largest = (path for _, path in files)
    # One file of each role: data files are alike, but for their names of 32 digits.
    others = {path.parent if re.fullmatch("[0-9a-f]{32}", path.name) else path: path for _, path in files}
    assert len(others) > 8
    run, intact = folder / "run", restored(whole)
    assert intact[0] == 6
    for path in {largest, *others.values()}:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole / "checkpoints", run / "checkpoints")
        damage(run / path, how)
        step, arrays = restored(run)
        said = capsys.readouterr().err
        if step == 6:  # nothing is read from this file
            assert path != largest
            jax.tree.map(np.testing.assert_array_equal, arrays, intact[1])
            assert said == ""
        else:
            assert step == 4, path
            assert f"the checkpoint of step 6 is damaged and was moved to {run / 'damaged-6'}" in said


@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(folder, whole, capsys, how):
    run = folder / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "model")
    damage(max((run / "checkpoints/6").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size), how)
    train(recipe_in(folder))
    said = capsys.readouterr().err
    assert "resumed     after 4 steps" in said
    assert f"the checkpoint of step 6 is damaged and was moved to {run / 'damaged-6'}" in said
    assert losses(run) == losses(whole)
    same(run, whole)


def test_a_changed_recipe_is_refused_unless_allowed(folder, whole):
    shutil.copytree(whole, folder / "run")
    longer = recipe_in(folder, run_steps=8, optimizer_b1=0.8)
    message = "optimizer.b1 was 0.9 and is now 0.8; run.steps was 6 and is now 8"
    with pytest.raises(UserError) as error:
        train(longer)
    assert all(part in str(error.value) for part in message.split("; "))
    assert "--allow-changes" in str(error.value)
    train(longer, allow_changes=True)
    assert [step for step, _ in losses(folder / "run")] == list(range(1, 9))


def test_how_often_it_saves_may_change(folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(recipe_in(folder))
    train(recipe_in(folder, run_save_every=1, run_keep_last=1, run_keep_every=4, run_log_every=2))
    assert sorted(path.name for path in (folder / "run/checkpoints").iterdir()) == ["4", "6"]
    assert [step for step, _ in losses(folder / "run")] == [1, 2, 3, 4, 6]


def test_other_data_and_another_start_are_refused(folder, whole, tmp_path):
    shutil.copytree(whole, folder / "run")
    (folder / "data").unlink()
    write_data(folder / "data", rows=23)
    with pytest.raises(UserError, match=r"data\.conversations contains different rows"):
        train(recipe_in(folder))
    (folder / "start").unlink()
    checkpoint.save(folder / "start", CONFIG, init_params(CONFIG, seed=5), companions=whole / "model")
    with pytest.raises(UserError, match=r"model\.start contains a different model"):
        train(recipe_in(folder))


def test_a_checkpoint_of_other_groups(folder, whole):
    shutil.copytree(whole, folder / "run")
    with pytest.raises(
        UserError, match=r"belongs to a different model or to different trained groups: 63 missing, 0 unexpected"
    ):
        train(recipe_in(folder, model_groups=("vision", "projector", "llm")), allow_changes=True)


def test_a_run_goes_on_with_another_schedule(folder, monkeypatch):
    """Weights and moments move: with as good as no learning rate left, nothing but the stages changes."""
    recipe = recipe_in(folder)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train(recipe)
    recipe = recipe_in(folder, model_layers=(2,), model_ratios=(0.5,), optimizer_learning_rate=0.0)
    train(recipe, allow_changes=True)
    config, params = checkpoint.load(folder / "run/model")
    assert config.schedule.layers == (2,)
    _, before = checkpoint.load(folder / "run/model", schedule=CONFIG.schedule)
    config = dataclasses.replace(CONFIG, schedule=config.schedule)
    assert params["stages"]["0"]["mlp"]["up"]["kernel"].shape[0] == 2
    shutil.rmtree(folder / "run/model")
    shutil.rmtree(folder / "run/checkpoints/6")
    shutil.rmtree(folder / "run/checkpoints/4", ignore_errors=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train(recipe_in(folder))
    train(recipe_in(folder, optimizer_learning_rate=0.0), allow_changes=True)
    _, after = checkpoint.load(folder / "run/model")
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_lora_is_merged_into_the_model(folder):
    recipe = recipe_in(folder, model_groups=("lora",), model_lora_rank=2, model_lora_alpha=4.0)
    train(recipe)
    start, model = (checkpoint.load(folder / name)[1] for name in ("start", "run/model"))
    assert jax.tree.structure(start) == jax.tree.structure(model)
    np.testing.assert_array_equal(start["embed"]["embedding"], model["embed"]["embedding"])
    changed = [
        np.abs(np.asarray(model["stages"]["0"]["mlp"][n]["kernel"] - start["stages"]["0"]["mlp"][n]["kernel"]))
        for n in ("up", "down")
    ]
    assert all(x.max() > 1e-4 for x in changed)


def test_a_run_that_chooses_by_another_score(folder):
    """One that follows hidden states through the layers, while they are made again for the gradient."""
    recipe = recipe_in(folder, model_layers=(1, 2), model_ratios=(0.5, 0.25), model_score="v2drop", run_steps=4)
    train(recipe)
    assert all(np.isfinite(loss) for _, loss in losses(folder / "run"))
    assert checkpoint.load(folder / "run/model")[0].schedule == DropSchedule((1, 2), (0.5, 0.25), "dense", "v2drop")


def test_a_model_that_knows_no_tiles_learns_them(folder):
    """LLaVA-NeXT's recipe from LLaVA-1.5's parts: a newline vector is drawn, and learns; so does the tower."""
    train(recipe_in(folder, data_image_aspect="anyres", model_groups=("vision", "projector", "llm")))
    (_, start), (config, model) = (checkpoint.load(folder / name) for name in ("start", "run/model"))
    assert config.tiling == Tiling.next(28)
    assert model["newline"]["embedding"].shape == (32,)
    before, after = (x["vision"]["layers"]["mlp"]["up"]["kernel"] for x in (start, model))
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 1e-4
    assert len(losses(folder / "run")) == 6
    train(recipe_in(folder, run_folder=str(folder / "on"), model_start=str(folder / "run/model"), run_steps=2))
    assert checkpoint.load(folder / "on/model")[0].tiling == config.tiling


def test_rows_of_one_kind_in_parts(folder):
    """Grouped, some batches have no picture at all. Adam's eps is large so that rounding is not made a step of."""
    recipe = {"data_group_by_length": True, "optimizer_eps": 1e-2, "run_steps": 8}
    for parts in (1, 2):
        train(recipe_in(folder, run_folder=str(folder / f"in-{parts}"), run_grad_accum_steps=parts, **recipe))
    lines = map(json.loads, (folder / "in-2/log.jsonl").read_text().splitlines())
    assert {bool(line["images"]) for line in lines if line.get("event") == "compiled"} == {True, False}
    one, two = (np.array(losses(folder / f"in-{parts}")) for parts in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(folder):
    recipe = recipe_in(folder, optimizer_learning_rate=1000.0, optimizer_weight_decay=1000.0, run_steps=60)
    with pytest.raises(UserError, match=r"not finite|contain NaN or infinity") as error:
        train(recipe)
    kept = max(int(path.name) for path in (folder / "run/checkpoints").iterdir())
    assert f"the checkpoint of step {kept} is kept: lower optimizer.learning_rate" in str(error.value)
    assert not (folder / "run/model").exists()
    with pytest.raises(UserError, match=r"not finite|contain NaN or infinity"):
        train(recipe)


def test_steps_that_are_skipped_in_a_row_stop_the_run(folder):
    """Weights are finite, logits are not, and so no gradient is."""
    config, params = checkpoint.load(folder / "start")
    params["head"]["kernel"] = params["head"]["kernel"] * np.float32(1e37)
    checkpoint.save(folder / "large", config, params, companions=folder / "start")
    recipe = {"model_start": str(folder / "large"), "run_steps": 20, "run_save_every": 4}
    message = (
        "the gradients of the last 10 steps, up to step 10, are not finite, so these steps were skipped; "
        "the checkpoint of step 8 is kept: lower optimizer.learning_rate, or raise run.max_skipped"
    )
    for _ in range(2):  # and again when it goes on after step 8
        with pytest.raises(UserError, match=re.escape(message)):
            train(recipe_in(folder, **recipe))
        assert [step for step, _ in losses(folder / "run")] == list(range(1, 11))
    train(recipe_in(folder, run_max_skipped=1000, **recipe))
    assert checkpoint.training(folder / "run/model")["step"] == 20


def test_a_model_that_is_not_finite_is_not_trained(folder):
    """One row of a table that no text of the data set looks at."""
    config, params = checkpoint.load(folder / "start")
    params["embed"]["embedding"] = params["embed"]["embedding"].at[-1, 0].set(np.nan)
    checkpoint.save(folder / "spoiled", config, params, companions=folder / "start")
    message = r"1 arrays of the model .*spoiled contain NaN or infinity, the first is embed\.embedding"
    with pytest.raises(UserError, match=message):
        train(recipe_in(folder, model_start=str(folder / "spoiled"), model_groups=("projector",)))
    assert not (folder / "run/checkpoints").exists()


def test_a_model_that_is_not_finite_is_not_written(folder, whole):
    shutil.copytree(whole, folder / "run")
    config, params = checkpoint.load(whole / "model")
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(np.inf)
    made_of = Trained(**checkpoint.training(whole / "model") | {"step": 8})
    with pytest.raises(UserError, match=r"after 8 steps is not written .* 1 of its arrays .* first is norm\.scale"):
        write_model(folder / "run/model", config, params, recipe_in(folder).model, made_of)
    same(folder / "run", whole)
    assert sorted(os.listdir(folder / "run")) == sorted(os.listdir(whole))


def test_a_model_says_what_it_is_made_of(whole, parts):
    about = checkpoint.training(whole / "model")
    assert about["step"] == 6
    assert about["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipe_in(parts))))
    assert about["start"] == checkpoint.fingerprint(parts / "start")


def age(model):
    """Makes ``model`` one that was written after step 4 of its run."""
    config, params = checkpoint.load(model)
    about = checkpoint.training(model) | {"step": 4, "checkpoint": "0"}
    shutil.rmtree(model)
    older = jax.tree.map(lambda x: x + 1, params)
    checkpoint.save(model, config, older, companions=model.parents[1] / "start", training=about)


def move(model, name):
    model.rename(model.with_name(name))


STALE = {
    "of an earlier step": age,
    "of an older version": lambda model: (model / checkpoint.TRAINING).unlink(),
    "damaged": lambda model: (model / checkpoint.TRAINING).write_bytes(b"{"),
    "not of a run": lambda model: (model / checkpoint.TRAINING).write_bytes(b'{"step": null}'),
    "killed before the new one has its name": lambda model: move(model, ".model.old"),
    "killed before the old one is removed": lambda model: shutil.copytree(model, model.with_name(".model.old")),
    "killed while it is written": lambda model: (age(model), (model.with_name(".model.new.unfinished")).mkdir()),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("how", STALE)
def test_a_model_that_is_not_of_the_last_step_is_written_again(folder, whole, how):
    shutil.copytree(whole, folder / "run")
    STALE[how](folder / "run/model")
    train(recipe_in(folder))
    same(folder / "run", whole)
    assert checkpoint.training(folder / "run/model")["checkpoint"] == checkpoint.training(whole / "model")["checkpoint"]
    left = {".model.old"} if how == "killed before the old one is removed" else set()
    assert set(os.listdir(folder / "run")) - left == set(os.listdir(whole))


def test_a_finished_run_with_another_schedule_gets_its_model(folder, whole):
    shutil.copytree(whole, folder / "run")
    train(recipe_in(folder, model_layers=(2,), model_ratios=(0.5,)), allow_changes=True)
    _, params = checkpoint.load(folder / "run/model", schedule=CONFIG.schedule)
    assert LlavaConfig.load(folder / "run/model").schedule.layers == (2,)
    jax.tree.map(np.testing.assert_array_equal, params, checkpoint.load(whole / "model")[1])


def test_nothing_compiles_after_the_first_step_of_a_shape(folder):
    before = train_step._cache_size()
    train(recipe_in(folder, run_steps=12))
    assert train_step._cache_size() - before <= compiled_in(folder / "run")


def test_rows_that_weigh_nothing_are_in_the_log(folder):
    (folder / "data").unlink()
    write_data(folder / "data")
    (folder / "data/images/1.png").write_bytes(b"\x89PNG broken")
    train(recipe_in(folder))
    lines = map(json.loads, (folder / "run/log.jsonl").read_text().splitlines())
    lost = sum(line["invalid"].get("corrupt image", 0) for line in lines if "loss" in line)
    assert lost == sum(1 for n in range(24) if n % 3 and n % 5 == 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_start": "nowhere"}, "nowhere is not a checkpoint"),
        ({"data_images": "nowhere"}, "data.images is nowhere, which is not a folder"),
        ({"data_conversations": "nowhere.json"}, "nowhere.json cannot be read: there is no such file"),
        (
            {"model_groups": ("head",)},
            "model.groups.0 is 'head', it must be 'vision', 'compressor', 'standby', 'projector', 'llm' or 'lora'",
        ),
        ({"model_groups": ()}, "model.groups is [], it must have at least 1 item"),
        ({"model_groups": ("lora",)}, "model.lora_rank is 0"),
        ({"model_lora_rank": 4}, "LoRA needs both a rank above 0 and the group"),
        ({"model_layers": (1,)}, "model.layers and model.ratios must be given together"),
        ({"model_layers": (9,), "model_ratios": (0.5,)}, "9"),
        ({"run_batch_size": 25}, "24 usable rows, but the batch size is 25"),
        ({"run_grad_accum_steps": 3}, "is not divisible by 3"),
    ],
)
def test_recipes_that_cannot_run(folder, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train(recipe_in(folder, **changes))
    assert not (folder / "run/model").exists()
