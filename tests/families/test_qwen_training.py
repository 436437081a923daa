"""Losses and gradients of Qwen-VL against torch, and training it."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_qwen
import torch
from tiny_qwen import KINDS, photo, torch_inputs, torch_model
from torch_drops import drop_run

from pdrop_jax import checkpoint
from pdrop_jax.batch import IGNORE
from pdrop_jax.convert.names import torch_arrays
from pdrop_jax.families.qwen2_vl.checkpoint import NAMINGS
from pdrop_jax.inputs.assemble import assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model.loss import compute_loss, count_targets
from pdrop_jax.schedule import DropSchedule

ROWS = [("Which?", [photo(75, 300, 3)], "Yes."), ("Both", [photo(40, 50, 1), photo(120, 90, 2)], "No, none")]


@pytest.mark.parametrize(("layers", "ratios"), [((), ()), ((1, 3), (0.5, 0.2))])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_those_of_torch(kind, layers, ratios, folders):
    config, params = checkpoint.load(folders[kind][1], schedule=DropSchedule(layers, ratios))
    processor = Processor.load(folders[kind][1], config)
    model = torch_model(kind)
    model.zero_grad()
    rows, total, targets = [], 0.0, 0
    for question, images, answer in ROWS:
        new = tiny_qwen.tokenizer()(answer)["input_ids"]
        row = processor.row(question, images)
        ids = [*row.ids, *new]
        rows.append(dataclasses.replace(row, ids=ids, labels=[IGNORE] * len(row.ids) + new))
        logits, _ = drop_run(model, torch_inputs(question, images), list(layers), ratios, new_ids=new)
        predicted = logits[-len(new) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(predicted, torch.tensor(new), reduction="sum")
        targets += len(new)
    (total / targets).backward()

    batch = assemble(rows, config, choose_bucket(rows, config))
    assert int(count_targets(batch.labels)) == targets

    def loss(params, remat):
        return compute_loss(config, params, batch, remat=remat)[0] / targets

    for remat in ("none", "full"):
        value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, remat)
        assert abs(float(value) - total.item() / targets) < 1e-4
        ours = torch_arrays(config, jax.device_get(gradient), NAMINGS["hf-modules"])
        theirs = {name: x.grad.numpy() for name, x in model.named_parameters()}
        assert ours.keys() == theirs.keys()
        for name, x in theirs.items():
            assert np.abs(ours[name] - x).max() <= 1e-4 * max(np.abs(x).max(), 1e-2), name
            assert np.abs(x).max() > 1e-6, name
