"""Losses and gradients of Gemma 3 against torch, and training it."""

import dataclasses

import numpy as np
import pytest
import tiny_gemma
import torch
from checks import check_gradients
from test_qwen_training import recipe_in
from tiny_gemma import photo, torch_inputs, torch_model
from tiny_run import losses
from torch_gemma_drops import drop_run

from pdrop_jax import checkpoint
from pdrop_jax.batch import IGNORE
from pdrop_jax.errors import UserError
from pdrop_jax.families.gemma3.checkpoint import NAMINGS
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.loop import train

ROWS = [("Which?", [photo(75, 300, 3)], "Yes."), ("Both", [photo(40, 50, 1), photo(120, 90, 2)], "No, none")]


@pytest.mark.parametrize(("layers", "ratios", "remat"), [((), (), "none"), ((2, 4), (0.5, 0.2), "full")])
def test_loss_and_every_gradient_are_those_of_torch(layers, ratios, remat, gemma):
    config, params = checkpoint.load(gemma[1], schedule=DropSchedule(layers, ratios))
    processor = Processor.load(gemma[1], config)
    model = torch_model()
    model.zero_grad()
    rows, answers, predictions = [], [], []
    for question, images, answer in ROWS:
        new = tiny_gemma.tokenizer()(answer, add_special_tokens=False)["input_ids"]
        row = processor.row(question, images)
        rows.append(dataclasses.replace(row, ids=[*row.ids, *new], labels=[IGNORE] * len(row.ids) + new))
        inputs = torch_inputs(question, images)
        if layers:
            logits, _ = drop_run(model, inputs, list(layers), ratios, new_ids=new)
        else:  # transformers' own forward, masks and all
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([new])], 1)
            inputs["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, len(new)))
            logits = model(**{key: x for key, x in inputs.items() if key != "attention_mask"}).logits[0]
        answers.append(new)
        predictions.append(logits[-len(new) - 1 : -1])
    naming = NAMINGS["hf-5-modules"]
    for name, x in check_gradients(config, params, rows, answers, predictions, model, naming, remat).items():
        # All logits of a query move alike with a bias of the keys, unless rope turns them apart.
        assert np.abs(x).max() > 1e-7 or ("vision_tower" in name and "k_proj.bias" in name), name


@pytest.mark.parametrize(
    "groups",
    [
        {"groups": ("vision", "projector", "llm")},
        {"groups": ("lora",), "lora_rank": 2, "lora_alpha": 4.0},
    ],
    ids=lambda groups: "-".join(groups["groups"]),
)
def test_a_run(groups, gemma, tmp_path):
    recipe = recipe_in(tmp_path, gemma[1], **groups)
    train(recipe)
    found = [loss for _, loss in losses(tmp_path / "run")]
    assert len(found) == 6
    assert np.mean(found[-3:]) < np.mean(found[:3])


def test_what_a_data_set_cannot_have(gemma, gemma_crops, tmp_path):
    recipe = recipe_in(tmp_path, gemma[1], groups=("projector",))
    data = recipe.data
    with pytest.raises(UserError, match=r"data\.image_aspect is 'pad', but a gemma3 model takes pictures of any"):
        train(dataclasses.replace(recipe, data=dataclasses.replace(data, image_aspect="pad")))
    model = dataclasses.replace(recipe.model, start=str(gemma_crops))
    with pytest.raises(UserError, match="pan-and-scan is for prompts only"):
        train(dataclasses.replace(recipe, data=data, model=model))
