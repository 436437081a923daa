"""Models whose pictures are tiles against transformers' own classes."""

import jax
import numpy as np
import pytest
import torch
from checks import SAMPLING, check_drops, check_slots
from tiny_tiles import KINDS, PLACE, family, photo, smol_video, tokenizer, torch_inputs, torch_model
from torch_tile_drops import drop_run

from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.images import Video
from pdrop_jax.model.vision import tower_features
from pdrop_jax.model.vlm import forward
from pdrop_jax.schedule import DropSchedule

PHOTOS = [photo(40, 50, 1), photo(300, 120, 2), photo(75, 700, 3)]
FRAMES = [photo(60, 90, 4), photo(60, 90, 5), photo(60, 90, 6)]
ROWS = [("What is this?", PHOTOS[:1]), ("Which?", PHOTOS[2:]), ("Both", PHOTOS[:2]), ("No picture.", [])]
CROPS = {"internvl": [[1], [7], [1, 4], []], "smolvlm": [[5], [3], [5, 3], []]}
CROPS["idefics3"] = CROPS["smolvlm"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def dense(kind, tiles):
    return load(tiles[kind][1], schedule=DropSchedule.none())


@pytest.fixture(scope="module")
def batch(dense):
    questions, images = zip(*ROWS, strict=True)
    return dense.processor(list(questions), list(images))


def check_inputs(kind, batch, b, inputs):
    """Ids and pixels of a row are those of transformers."""
    n = int(batch.length[b])
    place = tokenizer(kind).convert_tokens_to_ids(PLACE[family(kind)])
    ids = np.where(batch.image_id[b, :n] > 0, place, batch.token_ids[b, :n])
    assert ids.tolist() == inputs["input_ids"][0].tolist()
    if "pixel_values" in inputs:
        theirs = inputs["pixel_values"].flatten(0, -4).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(batch.crops[b, : len(theirs)], theirs)
        assert not batch.crops[b, len(theirs) :].any()


def test_ids_and_pixels_are_those_of_transformers(kind, batch):
    for b, row in enumerate(ROWS):
        inputs, crops = torch_inputs(kind, *row)
        check_inputs(kind, batch, b, inputs)
        assert crops == CROPS[family(kind)][b]
        assert batch.image_id[b].max() == len(crops)  # all crops of a picture are one image


@pytest.mark.parametrize("kind", KINDS[:3], indirect=True)  # Idefics3's are SmolVLM's
def test_features_are_those_of_transformers(kind, dense, batch):
    features = jax.jit(tower_features, static_argnums=0)(dense.config, dense.params, batch).tokens
    for b, row in enumerate(ROWS[:3]):
        with torch.no_grad():
            found = torch_model(kind).model.get_image_features(torch_inputs(kind, *row)[0]["pixel_values"])
        theirs = torch.cat([x.reshape(-1, x.shape[-1]) for x in found.pooler_output]).numpy()
        index = batch.feature_index[b, :, 0]
        ours = np.asarray(features)[b, index[index >= 0]]
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("kind", ["internvl", "smolvlm"], indirect=True)
def test_dense_logits_are_those_of_transformers(kind, dense, batch):
    logits = jax.jit(forward, static_argnums=0)(dense.config, dense.params, batch).logits
    for b, row in enumerate(ROWS):
        with torch.no_grad():
            theirs = torch_model(kind)(**torch_inputs(kind, *row)[0]).logits[0].numpy()
        assert np.abs(np.asarray(logits)[b, : len(theirs)] - theirs).max() < 1e-4
        assert np.abs(theirs).max() > 0.5


@pytest.mark.parametrize("kind", ["internvl", "internvl-6b", "smolvlm"])
def test_greedy_answers_are_those_of_transformers(kind, tiles):
    model = load(tiles[kind][1], schedule=DropSchedule.none())
    questions, images = zip(*ROWS, strict=True)
    ours = generate(model, questions, images, Sampling(max_new_tokens=16))
    for b, row in enumerate(ROWS):
        inputs, _ = torch_inputs(kind, *row)
        with torch.no_grad():
            theirs = torch_model(kind).generate(**inputs, max_new_tokens=16, do_sample=False)
        new = theirs[0, inputs["input_ids"].shape[1] :].tolist()
        assert ours.token_ids[b] == new
        assert len(new) == 16


@pytest.mark.parametrize(
    ("kind", "layers", "ratios", "positions"),
    [
        ("internvl", (1, 3), (0.5, 0.25), "dense"),
        ("internvl-6b", (2,), (0.5,), "dense"),
        ("smolvlm", (1, 3), (0.5, 0.25), "original"),
    ],
)
def test_drops_are_those_of_a_torch_model_whose_tokens_are_deleted(kind, layers, ratios, positions, tiles):
    model = load(tiles[kind][1], schedule=DropSchedule(layers, ratios, positions))

    def run(row, new):
        return drop_run(
            kind, torch_model(kind), *torch_inputs(kind, *row), layers, ratios, positions=positions, new_ids=new
        )

    check_drops(model, ROWS, run, 4)
    questions, images = zip(*ROWS, strict=True)
    check_slots(model, ROWS, generate(model, questions, images, SAMPLING))


@pytest.mark.parametrize("kind", ["internvl", "smolvlm"])
def test_the_frames_of_a_video_are_one_image_between_captions(kind, tiles):
    model = load(tiles[kind][1], schedule=DropSchedule((1,), (0.5,)))
    video = Video(FRAMES, fps=1.0)
    batch = model.processor(["So?"], [[PHOTOS[0], video]])
    inputs, crops = torch_inputs(kind, "So?", PHOTOS[:1], FRAMES)
    check_inputs(kind, batch, 0, inputs)
    assert crops == [CROPS[kind][0][0], 3]
    answer = generate(model, ["So?"], [[PHOTOS[0], video]], Sampling(max_new_tokens=1))
    with torch.no_grad():
        logits, kept = drop_run(kind, torch_model(kind), inputs, crops, [1], [0.5])
    assert answer.kept[0] == kept
    assert answer.token_ids[0] == [int(logits[-1].argmax())]
    assert [len(image) for image in kept[0]] == [2 * crops[0], 6]


def test_a_video_within_a_question_is_written_as_by_transformers(tiles):
    """For a minute, at two frames a second, between texts."""
    processor, frames = load(tiles["smolvlm"][1]).processor, FRAMES * 41
    content = [{"type": "text", "text": "See "}, {"type": "video"}, {"type": "text", "text": "there?"}]
    batch = processor([[{"role": "user", "content": content}]], [[Video(frames, fps=2.0)]])
    written, clip = smol_video("smolvlm", frames, 2.0)
    ids = tokenizer("smolvlm")(f"<|im_start|>User: See {written}there?<end_of_utterance>\nAssistant:")["input_ids"]
    check_inputs("smolvlm", batch, 0, {"input_ids": [np.array(ids)], "pixel_values": clip[None]})
    assert "one hundred and twenty-three frames from a 0:01:01" in written
    assert "Frame from 01:01:" in written
