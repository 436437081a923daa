"""Losses and gradients of Qwen-VL against torch, and training it."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_qwen
from checks import check_gradients
from tiny_qwen import photo, torch_inputs, torch_model
from tiny_run import compiled_in, losses
from torch_drops import drop_run

from pdrop_jax import checkpoint
from pdrop_jax.batch import IGNORE
from pdrop_jax.convert.hf_config import namings_for
from pdrop_jax.convert.names import torch_arrays
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.loop import train
from pdrop_jax.train.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, Recipe, RunRecipe

ROWS = [("Which?", [photo(75, 300, 3)], "Yes."), ("Both", [photo(40, 50, 1), photo(120, 90, 2)], "No, none")]


# Each kind with and without drops, with and without remat. Qwen2-VL's layers are LLaVA's and Qwen3-VL's.
@pytest.mark.parametrize(
    ("kind", "layers", "ratios", "remat"),
    [
        ("qwen2_5_vl", (), (), "none"),
        ("qwen2_5_vl", (1, 3), (0.5, 0.2), "full"),
        ("qwen3_vl", (), (), "full"),
        ("qwen3_vl", (1, 3), (0.5, 0.2), "none"),
    ],
)
def test_loss_and_every_gradient_are_those_of_torch(kind, layers, ratios, remat, folders):
    config, params = checkpoint.load(folders[kind][1], schedule=DropSchedule(layers, ratios))
    processor = Processor.load(folders[kind][1], config)
    model = torch_model(kind)
    model.zero_grad()
    rows, answers, predictions = [], [], []
    for question, images, answer in ROWS:
        new = tiny_qwen.tokenizer()(answer)["input_ids"]
        row = processor.row(question, images)
        rows.append(dataclasses.replace(row, ids=[*row.ids, *new], labels=[IGNORE] * len(row.ids) + new))
        logits, _ = drop_run(model, torch_inputs(kind, question, images), list(layers), ratios, new_ids=new)
        answers.append(new)
        predictions.append(logits[-len(new) - 1 : -1])
    naming = list(namings_for(config).values())[-1]
    for name, x in check_gradients(config, params, rows, answers, predictions, model, naming, remat).items():
        assert np.abs(x).max() > 1e-6, name


SIZES = [(30, 40), (60, 50), (90, 30), (200, 60), (33, 180)]
# Seeds of the order of the rows. Every batch has a row of two pictures, but the fifth of the second order.
ONE_SHAPE, TWO_SHAPES = 5, 0


def recipe_in(folder, start, seed=ONE_SHAPE, **model):
    """A run over pictures of different sizes, one row in three without and one with two."""
    (folder / "images").mkdir()
    records = []
    for number in range(12):
        photo(*SIZES[number % 5], number).save(folder / f"images/{number}.png")
        pictures = [[], [number], [number, (number + 1) % 12]][number % 3]
        names = [f"{picture}.png" for picture in pictures]
        image = {"image": names if len(names) > 1 else names[0]} if names else {}
        turns = [
            {"from": "human", "value": "<image>" * len(names) + "What?"},
            {"from": "gpt", "value": f"n{number % 3}"},
        ]
        records.append({"id": number, "conversations": turns, **image})
    (folder / "data.json").write_text(json.dumps(records))
    data = DataRecipe(str(folder / "data.json"), str(folder / "images"), max_length=400, text_buckets=(128,))
    return Recipe(
        ModelRecipe(str(start), layers=(1, 3), ratios=(0.5, 0.25), dtype="float32", **model),
        data,
        RunRecipe(str(folder / "run"), batch_size=4, steps=6, save_every=6, seed=seed),
        OptimizerRecipe(learning_rate=3e-3, warmup=0.0),
    )


@pytest.mark.parametrize(
    ("kind", "groups", "seed"),
    [
        ("qwen2_5_vl", {"groups": ("lora",), "lora_rank": 2, "lora_alpha": 4.0}, ONE_SHAPE),
        ("qwen2_5_vl", {"groups": ("projector",)}, TWO_SHAPES),
        ("qwen3_vl", {"groups": ("vision", "projector", "llm")}, ONE_SHAPE),
    ],
    ids=lambda x: "-".join(x["groups"]) if isinstance(x, dict) else str(x),
)
def test_a_run_over_pictures_of_any_size(kind, groups, seed, folders, tmp_path):
    start = folders[kind][1]
    train(recipe_in(tmp_path, start, seed, **groups))
    found = [loss for _, loss in losses(tmp_path / "run")]
    assert np.mean(found[-3:]) < np.mean(found[:3])
    assert compiled_in(tmp_path / "run") == {ONE_SHAPE: 1, TWO_SHAPES: 2}[seed]
    config, before = checkpoint.load(start, schedule=DropSchedule((1, 3), (0.5, 0.25)))
    trained, after = checkpoint.load(tmp_path / "run/model")
    assert trained == config
    naming = namings_for(config)["hf"]
    old, new = (torch_arrays(config, params, naming) for params in (before, after))
    changed = {
        next((part for part in ("visual", "lm_head") if part in name), "model")
        for name, x in old.items()
        if not np.array_equal(x, new[name])
    }
    expected = {"vision": "visual", "projector": "visual", "llm": "model", "lora": "model"}
    assert changed >= {expected[group] for group in groups["groups"]}
    assert changed <= {expected[group] for group in groups["groups"]} | {"lm_head"}
    answer = generate(load(tmp_path / "run/model"), ["What?"], [photo(60, 50)], Sampling(max_new_tokens=1))
    assert answer.image_tokens == [[4]]


def test_an_aspect_is_refused(folders, tmp_path):
    recipe = recipe_in(tmp_path, folders["qwen2_vl"][1], groups=("projector",))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, image_aspect="pad"))
    with pytest.raises(UserError, match=r"data\.image_aspect is 'pad', but a qwen2_vl model takes pictures of any"):
        train(recipe)
