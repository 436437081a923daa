"""Losses and gradients of models with tiles against torch, and training them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from checks import check_gradients
from tiny_run import compiled_in, losses
from tiny_tiles import photo, tokenizer, torch_inputs, torch_model
from torch_tile_drops import drop_run

from pdrop_jax import checkpoint
from pdrop_jax.batch import IGNORE
from pdrop_jax.convert.hf_config import namings_for
from pdrop_jax.inputs.assemble import assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.data.index import open_dataset
from pdrop_jax.train.loop import train
from pdrop_jax.train.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, Recipe, RunRecipe

ROWS = [("Which?", [photo(75, 300, 3)], "Yes."), ("Both", [photo(40, 50, 1), photo(120, 90, 2)], "No, none")]


@pytest.mark.parametrize(
    ("kind", "layers", "ratios", "remat"),
    [("internvl-6b", (), (), "none"), ("smolvlm", (), (), "full")],
)
def test_loss_and_every_gradient_are_those_of_torch(kind, layers, ratios, remat, tiles):
    config, params = checkpoint.load(tiles[kind][1], schedule=DropSchedule(layers, ratios))
    processor = Processor.load(tiles[kind][1], config)
    model = torch_model(kind)
    model.zero_grad()
    rows, answers, predictions = [], [], []
    for question, images, answer in ROWS:
        new = tokenizer(kind)(answer)["input_ids"]
        row = processor.row(question, images)
        rows.append(dataclasses.replace(row, ids=[*row.ids, *new], labels=[IGNORE] * len(row.ids) + new))
        logits, _ = drop_run(kind, model, *torch_inputs(kind, question, images), list(layers), ratios, new_ids=new)
        answers.append(new)
        predictions.append(logits[-len(new) - 1 : -1])
    naming = list(namings_for(config).values())[-1]
    for name, x in check_gradients(config, params, rows, answers, predictions, model, naming, remat).items():
        # All logits of a query move alike with a bias of the keys, unless rope turns them apart.
        assert np.abs(x).max() > 1e-7 or ("vision" in name and "k_proj.bias" in name), name


def recipe_in(folder, start, **model):
    """A run over pictures of one shape, so that one program is compiled."""
    (folder / "images").mkdir()
    records = []
    for number in range(4):
        photo(60, 200 - number, number).save(folder / f"images/{number}.png")
        turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": f"n{number % 3}"}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return Recipe(
        ModelRecipe(str(start), layers=(2,), ratios=(0.5,), dtype="float32", **model),
        DataRecipe(str(folder / "data.json"), str(folder / "images"), max_length=200, text_buckets=(64,)),
        RunRecipe(str(folder / "run"), batch_size=2, steps=6, save_every=6),
        OptimizerRecipe(learning_rate=1e-2, warmup=0.0),
    )


def test_a_run(tiles, tmp_path):
    """All of SmolVLM, whose rows have text between tiles."""
    train(recipe_in(tmp_path, tiles["smolvlm"][1], groups=("vision", "projector", "llm")))
    found = [loss for _, loss in losses(tmp_path / "run")]
    assert len(found) == 6
    assert np.mean(found[-3:]) < np.mean(found[:3])
    assert compiled_in(tmp_path / "run") == 1
    config, before = checkpoint.load(tiles["smolvlm"][1], schedule=DropSchedule((2,), (0.5,)))
    trained, after = checkpoint.load(tmp_path / "run/model")
    assert trained == config
    same = jax.tree.leaves_with_path(jax.tree.map(np.array_equal, before, after))
    assert {path[0].key for path, equal in same if not equal} == before.keys()


def test_examples_are_prompts_with_their_answers(tiles, tmp_path):
    """A row of a data set has the ids of a prompt, with the texts between tiles, and its labels are the answer."""
    kind = "smolvlm"
    recipe = recipe_in(tmp_path, tiles[kind][1], groups=("projector",))
    config, _ = checkpoint.load(tiles[kind][1])
    dataset = open_dataset(recipe.data, config, tiles[kind][1], progress=False)
    processor = Processor.load(tiles[kind][1], config)
    row, reason = dataset.row(1)
    prompt = processor.row("<image>What?", [photo(60, 199, 1)])
    answer = tokenizer(kind)(" n1<end_of_utterance>", add_special_tokens=False)["input_ids"]
    assert reason is None
    assert row.ids[: len(prompt.ids) + len(answer)].tolist() == [*prompt.ids, *answer]
    assert [int(i) for i in row.labels if i != IGNORE] == answer
    assert np.array_equal(row.images[0].crops, prompt.images[0].crops)
    text = dataset.sizes.text[1]
    assert text == len(row.ids) - 3  # 1 x 2 tiles and the whole
    # A picture that cannot be read has grey parts in its place.
    (tmp_path / "images/2.png").write_bytes(b"no picture")
    skipping = dataclasses.replace(dataset, data=dataclasses.replace(recipe.data, invalid="skip"))
    row, reason = skipping.row(2)
    assert reason == "corrupt image"
    batch = assemble([row], config, choose_bucket([row], config))
    assert int((batch.image_id > 0).sum()) == 3
