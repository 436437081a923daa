"""Masks and scores by the slots before the drops, image processors, and what Gemma 3 refuses."""

import copy
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gemma
import torch
from tiny_gemma import WINDOW, photo, torch_inputs, torch_model
from torch_gemma_drops import attention_from, mask_of

from pdrop_jax import checkpoint
from pdrop_jax.analysis.figures import answer_picture
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.images import Video, blank, measure
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model.slot_attention import EVERYTHING, Places, sees
from pdrop_jax.model.vlm import embed_tokens, forward
from pdrop_jax.schedule import DropSchedule

PHOTO = photo(60, 200, 1)


@pytest.mark.parametrize("window", [4, EVERYTHING])
def test_what_a_token_sees(window):
    """Text, a picture of two tokens, text; padding behind them has the index 0 and is seen by itself alone."""
    index = jnp.array([[0, 2, 3, 5, 0]])
    places = Places(jnp.arange(5)[None], index, jnp.array([[0, 1, 1, 0, 0]]))
    expected = ["1....", "111..", "111..", "1111." if window == EVERYTHING else ".111."]
    seen = np.asarray(sees(places, places, window))[0]
    assert ["".join(".1"[int(x)] for x in row) for row in seen[:4]] == expected
    assert seen[4, 4]


def test_a_window_hides_the_end_of_no_picture_but_its_own_start():
    places = Places(jnp.arange(6)[None], jnp.arange(6)[None], jnp.array([[0, 1, 1, 1, 1, 0]]))
    seen = np.asarray(sees(places, places, 2))[0]
    assert seen.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize(("layer", "score"), [(2, "pyramiddrop"), (4, "pyramiddrop"), (3, "fastv"), (5, "fastv")])
def test_scores_are_the_attention_of_the_layer(layer, score, gemma):
    """``fastv`` scores with the layer before: its rope and its window, which differ where the next one sees all.

    Each scores with a layer that sees everything, 2, and with one that has a window, 4; behind the latter is layer 5,
    which sees everything.
    """
    schedule = DropSchedule((layer,), (0.5,), score=score)
    model = load(gemma[1], schedule=schedule)
    batch = model.processor(["What?"], [PHOTO])
    found = jax.jit(forward, static_argnums=0)(model.config, model.params, batch).drops[0]
    inputs, number = torch_inputs("What?", [PHOTO]), layer - (score == "fastv")
    with torch.no_grad():
        states = torch_model()(**inputs, output_hidden_states=True).hidden_states
        language = torch_model().model.language_model
        shown, n = inputs["token_type_ids"][0], inputs["input_ids"].shape[1]
        kind = language.config.layer_types[number]
        mask = mask_of(kind, torch.arange(n), shown, WINDOW)
        rope = language.rotary_emb(states[number], torch.arange(n)[None], kind)
        expected = attention_from(language.layers[number], states[number], rope, n - 1, mask).numpy()
    assert np.abs(np.asarray(found.scores)[0, :n] - expected).max() < 1e-5
    picture = np.asarray(batch.image_id[0, :n]) == 1
    if kind == "sliding_attention":  # the question is longer than the window: nothing of the picture is in it
        assert not np.asarray(found.scores)[0, :n][picture].any()
        assert np.flatnonzero(found.keep[0, :n] & picture).tolist() == np.flatnonzero(picture)[:8].tolist()
    else:
        assert np.asarray(found.scores)[0, :n][picture].all()


@pytest.mark.parametrize("score", ["feather", "v2drop", "last_text", "all_text", "norm", "random", "none"])
def test_other_scores_keep_their_count(score, gemma):
    counts = [0, 0] if score == "none" else [8, 4]
    model = load(gemma[1], schedule=DropSchedule((2, 4), tuple(n / 16 for n in counts), score=score))
    answer = generate(model, ["What?"], [[PHOTO, PHOTO]], Sampling(max_new_tokens=1))
    assert [[len(image) for image in at] for at in answer.kept[0]] == [[n, n] for n in counts]


def test_the_factor_of_the_embeddings_is_rounded_as_by_torch(gemma):
    """The square root of 72 is 8.485, but 8.5 in bfloat16."""
    config, params = checkpoint.load(gemma[1])
    table = jnp.asarray(params["embed"]["embedding"], jnp.bfloat16)
    ours = embed_tokens(config, {"embed": {"embedding": table}}, jnp.arange(20)[None])
    theirs = copy.deepcopy(torch_model().get_input_embeddings()).to(torch.bfloat16)(torch.arange(20)[None])
    assert np.array_equal(np.asarray(ours, np.float32), theirs.detach().float().numpy())


def test_figures_show_the_crops_of_a_picture(gemma_crops):
    model = load(gemma_crops, schedule=DropSchedule((2,), (0.5,)))
    kept = generate(model, ["What?"], [[PHOTO, photo(50, 50, 2)]], Sampling(max_new_tokens=1)).kept[0]
    drawn = answer_picture([PHOTO, photo(50, 50, 2)], kept, model.processor)
    assert [len(images) for images in kept] == [1 + 3 + 1]
    assert drawn.height > 5 * tiny_gemma.SIDE


@pytest.mark.parametrize("implementation", ["splash", "cudnn"])
def test_kernels_without_such_masks_are_refused(implementation, gemma):
    model = load(gemma[1])
    with pytest.raises(UserError, match=f"{implementation} attention has no masks for pictures") as error:
        forward(model.config, model.params, model.processor(["No picture."]), implementation=implementation)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 56, "width": 56}}, "does not resize pictures to the vision tower's 112x112 pixels"),
        ({"do_resize": False}, "does not resize pictures to the vision tower's 112x112 pixels"),
        ({"image_seq_length": 256}, "image_seq_length of 256, but a picture is 16 tokens of this model"),
        ({"pan_and_scan_max_num_crops": 0}, "pan_and_scan_max_num_crops is 0"),
        ({"size": {"shortest_edge": 112}}, "does not resize pictures to the vision tower's 112x112 pixels"),
    ],
)
def test_an_image_processor_that_contradicts_the_model(changes, message, gemma, tmp_path):
    for path in pathlib.Path(gemma[1]).iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message) as error:
        Processor.load(tmp_path, LlavaConfig.load(gemma[1]))
    assert "\n" not in str(error.value)


def test_a_model_without_an_image_processor_has_gemmas(gemma, tmp_path):
    for path in (*pathlib.Path(gemma[1]).glob("tokenizer*"), pathlib.Path(gemma[1]) / "chat_template.jinja"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = LlavaConfig.load(gemma[1])
    ours, theirs = (Processor.load(folder, config)(["?"], [PHOTO]) for folder in (tmp_path, gemma[1]))
    assert np.array_equal(ours.crops, theirs.crops)
    assert blank(config).size == measure(PHOTO, Processor.load(tmp_path, config).image_processor, config, alone=True)


def test_videos_and_long_pictures_of_data_sets_are_refused(gemma, gemma_crops):
    with pytest.raises(UserError, match="a gemma3 model takes no videos: pass the frames as pictures"):
        generate(load(gemma[1]), ["?"], [Video([PHOTO])])
    processor = Processor.load(gemma_crops, LlavaConfig.load(gemma_crops))
    with pytest.raises(UserError, match="set do_pan_and_scan to false"):
        measure(PHOTO, processor.image_processor, processor.config, alone=True)


def test_text_configs_that_contradict_themselves(gemma):
    text = LlavaConfig.load(gemma[1]).text
    with pytest.raises(UserError, match=r"full_layers \[2, 9\] are of a decoder of 6 layers"):
        dataclasses.replace(text, full_layers=(2, 9))
    with pytest.raises(UserError, match="with sliding window None"):
        dataclasses.replace(text, sliding_window=None)
    assert text.window_of(3) == WINDOW
    assert text.window_of(2) is None
