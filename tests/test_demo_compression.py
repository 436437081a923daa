"""The comparison of compressors on the demo's data, at a tiny size."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from examples.demo import compression
from examples.demo.compression import VARIANTS, Result, run, table, write_start
from pdrop_jax import checkpoint
from pdrop_jax.config import EarlyCompression, LlavaConfig, Tiling
from pdrop_jax.errors import UserError
from pdrop_jax.model.params import abstract_params, path_name
from pdrop_jax.train.model import open_start
from pdrop_jax.train.recipe import DataRecipe, ModelRecipe
from pdrop_jax.train.step import split


def test_every_variant_starts_from_the_trained_demo_with_a_quarter_of_its_tokens(tmp_path):
    layers = []
    for n, name in enumerate(VARIANTS):
        config = write_start(tmp_path / str(n), name, seed=0)
        assert config.image_tokens == 36
        found, params = checkpoint.load(tmp_path / str(n))
        assert found == config
        assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, abstract_params(config))
        layers.append(np.asarray(params["vision"]["layers"]["mlp"]["up"]["kernel"][0]))
    assert all(np.array_equal(layers[0], other) for other in layers)


def test_what_training_makes_of_such_a_model(tmp_path):
    plain, compressed = tmp_path / "plain", tmp_path / "compressed"
    for folder, name in zip((plain, compressed), (next(iter(VARIANTS)), list(VARIANTS)[3]), strict=True):
        write_start(folder, name, seed=0)
    stage = ModelRecipe(str(compressed), ("compressor", "projector"))
    config, params = open_start(stage, DataRecipe("-", image_aspect="slices"), seed=0)
    assert config.tiling == Tiling.slices(168)
    assert params["newline"]["embedding"].shape == (128,)
    trained, _ = split(config, params, stage.groups)
    names = {path_name(path) for path, x in jax.tree.leaves_with_path(trained)}
    assert {name.partition(".mlp")[0].partition(".attention")[0] for name in names if "vision" in name} == {
        "vision.compressor"
    }
    assert {name.partition(".")[0] for name in names} == {"vision", "projector"}
    with pytest.raises(UserError, match='names "compressor", but the vision tower has none'):
        open_start(ModelRecipe(str(plain), ("compressor",)), DataRecipe("-"), seed=0)


def test_a_run_of_two_steps(tmp_path, monkeypatch, capsys):
    name = "window attention and reused MLP, k = 0"
    monkeypatch.setattr(compression, "VARIANTS", {name: (EarlyCompression(0), 1)})
    monkeypatch.setattr(compression, "HELD_OUT", 16)
    recipe = compression.RECIPE.read_text().replace('"muon"', '"adamw"').replace("[4, 5, 6]", "[]")
    (tmp_path / "recipe.toml").write_text(recipe.replace("[0.5, 0.25, 0.125]", "[]"))  # which compiles sooner
    monkeypatch.setattr(compression, "RECIPE", tmp_path / "recipe.toml")
    run(tmp_path / "out", pictures=32, steps=2)
    result = Result(**json.loads((tmp_path / "out" / "0-0" / "result.json").read_text()))
    assert (result.name, len(result.losses)) == (name, 2)
    assert np.isfinite(result.losses).all()
    assert LlavaConfig.load(tmp_path / "out" / "0-0" / "model").vision.early_compression == EarlyCompression(0)
    first = capsys.readouterr().out
    assert f"| {name} | {result.tower_macs / 1e6:,.0f} M | {result.losses[0]:.4f} | {result.losses[1]:.4f} |" in first
    run(tmp_path / "out", pictures=32, steps=2)  # nothing is trained again
    assert capsys.readouterr().out == first


def test_the_table_has_means_and_ranges():
    one = Result("a", 0, 2_000_000, [1.5, 1.0])
    runs = [(name, seed) for name in VARIANTS for seed in (0, 1)]
    results = [dataclasses.replace(one, name=name, seed=seed, losses=[2.0, seed]) for name, seed in runs]
    assert "| average pool, k = 1 | 2 M | 2.0000 (2.0000 to 2.0000) | 0.5000 (0.0000 to 1.0000) |" in table(results)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_names_say_the_layer(name):
    compressed, merge = VARIANTS[name]
    assert (compressed is None) == (merge == 2)
    assert compressed is None or name.endswith(f"k = {compressed.after}")
