"""Gemma 3 against transformers' own classes."""

import jax
import numpy as np
import pytest
import tiny_gemma
import torch
from checks import check_drops, check_rows_alone, check_slots
from tiny_gemma import PAN_AND_SCAN, photo, torch_inputs, torch_model
from torch_gemma_drops import drop_run

from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.model.vision import tower_features
from pdrop_jax.model.vlm import forward
from pdrop_jax.schedule import DropSchedule

PHOTOS = [photo(40, 50, 1), photo(300, 120, 2), photo(75, 700, 3)]
ROWS = [("What is this?", PHOTOS[:1]), ("And this?", PHOTOS[1:2]), ("Which?", PHOTOS[2:]), ("Both", PHOTOS[1:])]
ROWS.append(("No picture.", []))
IMAGE = tiny_gemma.tokenizer().convert_tokens_to_ids("<image_soft_token>")


@pytest.fixture(scope="module", params=["squares", "pan-and-scan"])
def settings(request):
    return {} if request.param == "squares" else PAN_AND_SCAN


@pytest.fixture(scope="module")
def folder(gemma, gemma_crops, settings):
    return gemma_crops if settings else gemma[1]


@pytest.fixture(scope="module")
def dense(folder):
    return load(folder, schedule=DropSchedule.none())


@pytest.fixture(scope="module")
def batch(dense):
    questions, images = zip(*ROWS, strict=True)
    return dense.processor(list(questions), list(images))


def test_ids_and_pixels_are_those_of_transformers(batch, settings):
    pictures = []
    for b, row in enumerate(ROWS):
        inputs = torch_inputs(*row, **settings)
        n = int(batch.length[b])
        ids = np.where(batch.image_id[b, :n] > 0, IMAGE, batch.token_ids[b, :n])
        assert ids.tolist() == inputs["input_ids"][0].tolist()
        pictures.append(len(inputs.get("pixel_values", ())))
        if row[1]:
            theirs = inputs["pixel_values"].permute(0, 2, 3, 1).numpy()
            assert np.array_equal(batch.crops[b, : len(theirs)], theirs)
    assert pictures == ([1, 4, 4, 8, 0] if settings else [1, 1, 1, 2, 0])


def test_features_are_those_of_transformers(dense, batch, settings):
    features = jax.jit(tower_features, static_argnums=0)(dense.config, dense.params, batch).tokens
    for b, row in enumerate(ROWS[:4]):
        with torch.no_grad():
            found = torch_model().get_image_features(torch_inputs(*row, **settings)["pixel_values"])
        theirs = found.pooler_output.flatten(0, 1).numpy()
        index = batch.feature_index[b, :, 0]
        ours = np.asarray(features)[b, index[index >= 0]]
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_dense_logits_are_those_of_transformers(dense, batch, settings):
    logits = jax.jit(forward, static_argnums=0)(dense.config, dense.params, batch).logits
    for b, row in enumerate(ROWS):
        with torch.no_grad():
            theirs = torch_model()(**torch_inputs(*row, **settings)).logits[0].numpy()
        assert np.abs(np.asarray(logits)[b, : len(theirs)] - theirs).max() < 1e-4
        assert np.abs(theirs).max() > 0.5


def test_greedy_answers_are_those_of_transformers(dense, settings):
    questions, images = zip(*ROWS, strict=True)
    ours = generate(dense, questions, images, Sampling(max_new_tokens=16))
    for b, row in enumerate(ROWS):
        inputs = torch_inputs(*row, **settings)
        with torch.no_grad():
            theirs = torch_model().generate(**inputs, max_new_tokens=16, do_sample=False)
        new = theirs[0, inputs["input_ids"].shape[1] :].tolist()
        assert ours.token_ids[b] == new
        assert len(new) == 16


# Both schedules with both ways to count positions, and both kinds of pictures with each.
@pytest.mark.parametrize(
    ("settings", "layers", "ratios", "positions"),
    [
        ("squares", (2, 4), (0.5, 0.2), "dense"),
        ("squares", (0, 3), (0.7, 0.0), "original"),
        ("pan-and-scan", (2, 4), (0.5, 0.2), "original"),
        ("pan-and-scan", (0, 3), (0.7, 0.0), "dense"),
    ],
    indirect=["settings"],
)
def test_drops_are_those_of_a_torch_model_whose_tokens_are_deleted(folder, settings, layers, ratios, positions):
    """The layers after the drops are one of each kind: 2 sees everything, 0, 3 and 4 have a window."""
    model = load(folder, schedule=DropSchedule(layers, ratios, positions))

    def run(row, new):
        return drop_run(torch_model(), torch_inputs(*row, **settings), layers, ratios, positions=positions, new_ids=new)

    check_drops(model, ROWS, run, 5)


def test_a_row_keeps_the_same_tokens_alone_and_in_a_batch(folder, settings):
    model = load(folder, schedule=DropSchedule((2, 4), (0.5, 0.2), "original" if settings else "dense"))
    batch = check_rows_alone(model, ROWS, [1, 2, 3] if settings else [1, 2])
    if not settings:  # each row is prefilled alone there, too
        check_slots(model, ROWS, batch)
