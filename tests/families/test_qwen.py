"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers' own classes."""

import jax
import numpy as np
import pytest
import tiny_qwen
import torch
from checks import check_drops, check_rows_alone, check_slots
from tiny_qwen import KINDS, photo, torch_inputs, torch_model
from torch_drops import drop_run

from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.model.vision import tower_features
from pdrop_jax.model.vlm import forward
from pdrop_jax.schedule import DropSchedule

PHOTOS = [photo(40, 50, 1), photo(300, 120, 2), photo(75, 700, 3)]
ROWS = [("What is this?", PHOTOS[:1]), ("And this?", PHOTOS[1:2]), ("Which?", PHOTOS[2:]), ("Both", PHOTOS[1:])]
ROWS.append(("No picture.", []))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def dense(folders, kind):
    return load(folders[kind][1], schedule=DropSchedule.none())


@pytest.fixture(scope="module")
def batch(dense):
    questions, images = zip(*ROWS, strict=True)
    return dense.processor(list(questions), list(images))


def theirs_of(kind, row):
    inputs = torch_inputs(kind, *row)
    with torch.no_grad():
        return inputs, torch_model(kind)(**inputs).logits[0].numpy()


def test_ids_pixels_and_positions_are_those_of_transformers(kind, dense, batch):
    pad = tiny_qwen.tokenizer().convert_tokens_to_ids("<|image_pad|>")
    for b, row in enumerate(ROWS):
        inputs = torch_inputs(kind, *row)
        n = int(batch.length[b])
        ids = np.where(batch.image_id[b, :n] > 0, pad, batch.token_ids[b, :n])
        assert ids.tolist() == inputs["input_ids"][0].tolist()
        if not row[1]:
            assert batch.positions[b, :n].tolist() == [[i] * 3 for i in range(n)]
            continue
        positions, _ = torch_model(kind).model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        assert batch.positions[b, :n].T.tolist() == positions[:, 0].tolist()
        values = batch.crops.shape[-1]
        index = batch.feature_index[b, :n, 0]
        patches = batch.crops[b].reshape(-1, 4, values)[index[index >= 0]].reshape(-1, values)
        assert np.array_equal(patches, inputs["pixel_values"].numpy())


def test_features_are_those_of_transformers(kind, dense, batch):
    features = jax.jit(tower_features, static_argnums=0)(dense.config, dense.params, batch).tokens
    for b, row in enumerate(ROWS[:4]):
        inputs = torch_inputs(kind, *row)
        with torch.no_grad():
            found = torch_model(kind).model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        theirs = torch.cat(list(found.pooler_output)).numpy()
        index = batch.feature_index[b, :, 0]
        pools = np.split(np.asarray(features)[b], 1 + dense.config.additions)
        assert dense.config.additions == (3 if kind == "qwen3_vl" else 0)
        expected = [
            theirs,
            *(torch.cat(list(early)).numpy() for early in getattr(found, "deepstack_features", None) or ()),
        ]
        for pool, x in zip(pools, expected, strict=True):
            assert np.abs(pool[index[index >= 0]] - x).max() <= 1e-5 * np.abs(x).max()


def test_dense_logits_are_those_of_transformers(kind, dense, batch):
    logits = jax.jit(forward, static_argnums=0)(dense.config, dense.params, batch).logits
    for b, row in enumerate(ROWS):
        _, theirs = theirs_of(kind, row)
        assert np.abs(np.asarray(logits)[b, : len(theirs)] - theirs).max() < 1e-4
        assert np.abs(theirs).max() > 0.5


def test_greedy_answers_are_those_of_transformers(kind, dense):
    questions, images = zip(*ROWS, strict=True)
    ours = generate(dense, questions, images, Sampling(max_new_tokens=16))
    for b, row in enumerate(ROWS):
        inputs = torch_inputs(kind, *row)
        with torch.no_grad():
            theirs = torch_model(kind).generate(**inputs, max_new_tokens=16, do_sample=False)
        new = theirs[0, inputs["input_ids"].shape[1] :].tolist()
        assert ours.token_ids[b] == [i for i in new if i != tiny_qwen.tokenizer().eos_token_id]
        assert len(new) == 16


@pytest.mark.parametrize(
    ("kind", "layers", "ratios", "positions"),
    [
        *((kind, (1, 3), (0.5, 0.2), "original") for kind in KINDS),
        *((kind, (0, 2), (0.7, 0.0), "dense") for kind in KINDS if kind != "qwen2_5_vl"),  # whose decoder is Qwen2-VL's
    ],
    indirect=["kind"],
)
def test_drops_are_those_of_a_torch_model_whose_tokens_are_deleted(kind, folders, layers, ratios, positions):
    schedule = DropSchedule(layers, ratios, positions)
    model = load(folders[kind][1], schedule=schedule)

    def run(row, new):
        return drop_run(torch_model(kind), torch_inputs(kind, *row), layers, ratios, positions=positions, new_ids=new)

    check_drops(model, ROWS, run, 3)


def test_a_row_keeps_the_same_tokens_alone_and_in_a_batch(kind, folders):
    model = load(folders[kind][1], schedule=DropSchedule((1, 3), (0.5, 0.2)))
    slots = kind in ("qwen2_5_vl", "qwen3_vl")  # windows in the tower, additions in the first layers
    batch = check_rows_alone(model, ROWS, [1, 2] if slots else [1, 2, 3])
    if slots:  # where each row is prefilled alone, too
        check_slots(model, ROWS, batch)


def test_a_model_says_what_it_is(kind, dense):
    assert repr(dense).startswith(f"Model({kind}, ")


def test_positions_are_original_unless_asked_otherwise(kind, folders):
    assert load(folders[kind][1], schedule=DropSchedule((1,), (0.5,))).config.schedule.positions == "original"
