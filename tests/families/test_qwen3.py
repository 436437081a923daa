"""What Qwen3-VL has beside Qwen2-VL: DeepStack, timestamps, its config."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_qwen
import torch
from tiny_qwen import photo, torch_inputs, torch_model
from torch_drops import drop_run

from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hf_config import hf_config, llava_from_hf
from pdrop_jax.errors import UserError
from pdrop_jax.families.qwen3_vl.inputs import times
from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.result import kept_tokens
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.images import Video
from pdrop_jax.model.rope import turned_by
from pdrop_jax.model.vlm import forward
from pdrop_jax.schedule import DropSchedule

# config.json of the hub.
HUB_8B = {
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "vocab_size": 151936,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "intermediate_size": 4304,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
CLIP = [photo(100, 140, seed) for seed in range(5)]


def test_eight_billion_is_the_hubs_config():
    config = llava_from_hf(HUB_8B, generation={"eos_token_id": [151645, 151643]})
    assert config == LlavaConfig.qwen3_vl("8b")
    assert llava_from_hf(hf_config(config, "bfloat16"), schedule=config.schedule) == config


def changed(part, **values):
    return {part: HUB_8B[part] | values}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_vl_moe"}, "'qwen3_vl_moe' is not supported.* nearest supported family is qwen3_vl$"),
        (changed("vision_config", num_position_embeddings=2305), "num_position_embeddings is 2305, which is not a squ"),
        (changed("vision_config", deepstack_visual_indexes=[8, 4]), r"layers \[8, 4\] must be ascending and below"),
        (changed("vision_config", deepstack_visual_indexes=[8, 27]), r"\[8, 27\] must be .* below the tower's 27"),
        (changed("vision_config", out_hidden_size=2048), "out_hidden_size is 2048 but the language model has hidden_"),
        (changed("vision_config", depth="x"), r"vision_config\.depth is 'x'"),
        (changed("text_config", rope_scaling={"mrope_section": [24, 20, 10]}), "add up to half of head_dim 128"),
        (changed("text_config", rope_scaling={"rope_type": "yarn", "factor": 4.0}), "'yarn' is not supported"),
        (
            changed("text_config", num_hidden_layers=2),
            "3 layers of the vision tower are added behind the decoder's fir",
        ),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    with pytest.raises(UserError, match=message) as error:
        llava_from_hf(HUB_8B | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sections", [(24, 20, 20), (5, 4, 3), (2, 3, 3)])
def test_pairs_are_turned_as_in_transformers(sections):
    text = LlavaConfig.qwen3_vl("8b").text
    text = dataclasses.replace(text, mrope_sections=sections, head_dim=2 * sum(sections))
    rope = torch_model("qwen3_vl").model.language_model.rotary_emb
    before, rope.mrope_section = rope.mrope_section, list(sections)
    axes = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, sum(sections)).clone()
    found = rope.recomposition_frequencies(axes)[0, 0, : sum(sections)]
    rope.mrope_section = before
    assert turned_by(text).tolist() == found.tolist()


@pytest.mark.parametrize("layers", [(2,), (3,), (1, 2, 3)])
def test_additions_behind_a_drop_go_to_the_tokens_that_are_left(layers, folders):
    """Three are made, behind layers 1, 2 and 3: two, one or none of them after a drop."""
    ratios = (0.6, 0.4, 0.2)[: len(layers)]
    model = load(folders["qwen3_vl"][1], schedule=DropSchedule(layers, ratios))
    row = "Which?", [photo(300, 120, 2), photo(40, 50, 1)]
    batch = model.processor([row[0]], [row[1]])
    found = jax.jit(forward, static_argnums=0)(model.config, model.params, batch)
    logits = np.asarray(found.logits)[0]
    with torch.no_grad():
        theirs, kept = drop_run(torch_model("qwen3_vl"), torch_inputs("qwen3_vl", *row), layers, ratios)
    assert np.abs(logits[: len(theirs)] - theirs.numpy()).max() < 1e-4
    assert kept_tokens(batch, jax.device_get(found.drops))[0] == kept


def test_stacks_of_layers_and_lists_add_the_same(folders):
    """A scan over a stack decides at run time what a list of layers knows beforehand."""
    model = load(folders["qwen3_vl"][1], schedule=DropSchedule((2,), (0.5,)))
    assert isinstance(model.params["stages"]["0"], list)
    stacked = jax.tree.map(lambda *x: np.stack(x), *model.params["vision"]["layers"])
    params = {**model.params, "vision": {**model.params["vision"], "layers": stacked}}
    params["stages"] = {s: jax.tree.map(lambda *x: np.stack(x), *layers) for s, layers in params["stages"].items()}
    batch = model.processor(["Which?"], [[photo(75, 300, 3)]])
    run = jax.jit(forward, static_argnums=0)
    a, b = (np.asarray(run(model.config, given, batch).logits) for given in (model.params, params))
    assert np.abs(a - b)[0, : int(batch.length[0])].max() < 1e-5


def test_times_of_a_clip_are_those_of_transformers():
    for frames, fps in ((1, 2.0), (2, 2.0), (5, 2.0), (8, 7.0), (7, 0.1)):
        text = tiny_qwen.timestamps(torch.tensor([[-(-frames // 2), 2, 2]]), frames, fps)
        assert [f"<{time:.1f} seconds>" for time in times(frames, fps, 2)] == [
            part.split("<|")[0] for part in text.split("<|vision_end|>")[:-1]
        ]


def test_a_clip_stands_in_the_text_step_by_step(folders):
    """Text before a clip is tokenized with the first timestamp."""
    model = load(folders["qwen3_vl"][1])
    batch = model.processor(["Look: <image><image>?"], [[photo(60, 50), Video(CLIP, 3.0)]])
    theirs = torch_inputs("qwen3_vl", "?", [photo(60, 50)], CLIP, 3.0)["input_ids"][0].tolist()
    start = tiny_qwen.tokenizer()("<|im_start|>user\n")["input_ids"]
    expected = [*start, *tiny_qwen.tokenizer()("Look: ")["input_ids"], *theirs[len(start) :]]
    image, clip = tiny_qwen.tokenizer().convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    n = int(batch.length[0])
    ids = np.where(batch.image_id[0, :n] > 0, np.array([0, image, clip])[batch.image_id[0, :n]], batch.token_ids[0, :n])
    assert ids.tolist() == expected
    assert len(batch.bucket.images) == 2


@pytest.mark.parametrize("mode", ["rerank", "keep"])
def test_a_conversation_about_a_clip(mode, folders):
    """As if everything was asked at once; a clip is one image."""
    model = load(folders["qwen3_vl"][1], schedule=DropSchedule((1, 3), (0.5, 0.2)))
    sampling = Sampling(max_new_tokens=4)
    session = Session(model, mode)
    first = session.ask("What?", [photo(60, 50), Video(CLIP)], sampling)
    alone = generate(model, ["What?"], [[photo(60, 50), Video(CLIP)]], sampling)
    assert first.token_ids == alone.token_ids[0]
    assert first.kept == alone.kept[0]
    second = session.ask("And here?", photo(40, 90), sampling)
    assert [len(image) for image in second.kept[0]] == [2, 18, 3]  # 36 tokens in three steps are one image
    if mode == "keep":
        assert second.kept[0][:2] == first.kept[0]
    else:
        turns = [("<image><image>What?", first.text), ("<image>And here?", None)]
        at_once = generate(model, [turns], [[photo(60, 50), Video(CLIP), photo(40, 90)]], sampling)
        assert (second.token_ids, second.kept) == (at_once.token_ids[0], at_once.kept[0])
