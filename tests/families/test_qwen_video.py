"""Videos of Qwen-VL: temporal patches and positions in time."""

import jax
import numpy as np
import pytest
import tiny_qwen
import torch
from tiny_qwen import KINDS, photo, torch_inputs, torch_model
from torch_drops import drop_run

from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import generate, generate_batch
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.images import Video
from pdrop_jax.model.vision import tower_features
from pdrop_jax.model.vlm import forward
from pdrop_jax.schedule import DropSchedule

CLIP = [photo(100, 140, seed) for seed in range(5)]
# Question, pictures, frames, frames a second.
ROWS = [("What happens?", [], CLIP, 2.0), ("And here?", [photo(60, 50, 9)], CLIP[:4], 0.1), ("Fast", [], CLIP, 7.0)]


def test_a_slow_clip_reaches_beyond_the_text_behind_it(folders):
    batch = ours_of(load(folders["qwen2_5_vl"][1]))
    assert batch.positions[1, :, 0].max() > batch.positions[1, int(batch.length[1]) - 1, 0]


def ours_of(model):
    images = [[*pictures, Video(frames, fps)] for _, pictures, frames, fps in ROWS]
    return model.processor([row[0] for row in ROWS], images)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_positions_and_features(kind, folders):
    model = load(folders[kind][1], schedule=DropSchedule.none())
    batch = ours_of(model)
    features = np.asarray(jax.jit(tower_features, static_argnums=0)(model.config, model.params, batch)[0])
    for b, (question, pictures, frames, fps) in enumerate(ROWS):
        inputs = torch_inputs(kind, question, pictures, frames, fps)
        own = {"second_per_grid_ts": inputs["second_per_grid_ts"]} if kind == "qwen2_5_vl" else {}
        inner = torch_model(kind).model
        positions, _ = inner.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            inputs.get("image_grid_thw"),
            inputs["video_grid_thw"],
            **own,
        )
        n = int(batch.length[b])
        assert batch.positions[b, :n].T.tolist() == positions[:, 0].tolist()
        clip = batch.feature_index[b, batch.image_id[b] == len(pictures) + 1, 0]
        values = batch.crops.shape[-1]
        assert np.array_equal(
            batch.crops[b].reshape(-1, 4, values)[clip].reshape(-1, values), inputs["pixel_values_videos"].numpy()
        )
        with torch.no_grad():
            found = inner.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output[0]
        assert np.abs(features[b, clip] - found.numpy()).max() <= 1e-5 * found.abs().max()


@pytest.mark.parametrize(("layers", "ratios"), [((), ()), ((1, 3), (0.5, 0.2))])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_answers(kind, layers, ratios, folders):
    """A clip's tokens are kept by one count; the text behind it and the answer continue at its edge in space."""
    model = load(folders[kind][1], schedule=DropSchedule(layers, ratios))
    batch = ours_of(model)
    logits = jax.jit(forward, static_argnums=0)(model.config, model.params, batch).logits
    answers = generate_batch(model, batch, Sampling(max_new_tokens=4))
    for b, (question, pictures, frames, fps) in enumerate(ROWS):
        inputs = torch_inputs(kind, question, pictures, frames, fps)
        with torch.no_grad():
            theirs, kept = drop_run(torch_model(kind), inputs, list(layers), ratios)
            assert np.abs(np.asarray(logits)[b, : len(theirs)] - theirs.numpy()).max() < 1e-4
            assert answers.kept[b] == kept
            new = []
            for _ in answers.token_ids[b]:
                new.append(int(theirs[-1].argmax()))
                theirs, again = drop_run(torch_model(kind), inputs, list(layers), ratios, new_ids=new)
                assert again == kept
            assert answers.token_ids[b] == new
            if not layers:
                new = torch_model(kind).generate(**inputs, max_new_tokens=4, do_sample=False)
                assert answers.token_ids[b] == new[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (Video([]), "a video needs at least one frame"),
        (Video([photo(60, 50), photo(50, 60)]), "frames of a video have 50x60 and 60x50 pixels"),
        (Video([photo(60, 50)], fps=0.0), "has 0.0 frames a second: it must be 0.0001 or more"),
        (Video([photo(60, 50)], fps=float("nan")), "has nan frames a second"),
    ],
)
def test_videos_that_are_refused(video, message, folders):
    model = load(folders["qwen2_vl"][1])
    with pytest.raises(UserError, match=message):
        generate(model, ["?"], [video])


def test_ids_of_a_video(folders):
    model = load(folders["qwen2_5_vl"][1])
    ids = model.processor.row("What happens?", [Video(CLIP)]).ids
    theirs = torch_inputs("qwen2_5_vl", "What happens?", [], CLIP)["input_ids"][0]
    pad = tiny_qwen.tokenizer().convert_tokens_to_ids("<|video_pad|>")
    assert [i for i in ids if i >= 0] == [i for i in theirs.tolist() if i != pad]
