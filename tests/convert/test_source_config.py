"""LlavaConfig from both kinds of config.json."""

import dataclasses
import json

import pytest
import transformers
from tiny_torch import GOLDEN

from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.convert.hf_config import hf_config, llava_from_hf, with_image_token
from pdrop_jax.convert.hf_parts import vision_from_hf
from pdrop_jax.convert.original_config import KNOWN_TOWER, original_config
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

# As the checkpoints are published: llava-1.5-7b of the original code, and the one that transformers loads.
ORIGINAL_7B = {
    "model_type": "llava_llama",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": KNOWN_TOWER,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
HF_7B = {
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "text_config": {
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
OTHER = LlavaConfig(
    vision=VisionConfig(28, 14, 32, 64, 3, 4, 1e-4, "gelu"),
    text=TextConfig(99, 32, 48, 2, 4, 2, 16, 5e5, None, 1e-4, True, True, True, 77),
    schedule=DropSchedule.none(),
    select_layer=-1,
    keep_class_token=True,
    bos_token_id=3,
    eos_token_ids=(4, 5),
)
SIGLIP = VisionConfig(28, 14, 32, 64, 3, 4, 1e-6, "gelu_tanh", "siglip")
QWEN2 = dataclasses.replace(
    OTHER,
    vision=SIGLIP,
    text=dataclasses.replace(OTHER.text, family="qwen2", output_bias=False, sliding_window=6),
    keep_class_token=False,
    template="qwen",
    bos_token_id=None,
    eos_token_ids=(),
)
MISTRAL = dataclasses.replace(
    OTHER,
    text=dataclasses.replace(OTHER.text, family="mistral", qkv_bias=False, output_bias=False),
    template="mistral_instruct",
)


def test_the_published_original_7b():
    assert llava_from_hf(ORIGINAL_7B) == LlavaConfig.llava_1_5_7b()


def test_the_published_hugging_face_7b():
    expected = LlavaConfig(text=TextConfig(vocab_size=32064), image_token_id=32000)
    assert llava_from_hf(HF_7B) == expected


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model"])
def test_keys_left_out_have_the_defaults_of_transformers(text, vision):
    data = {"text_config": {"model_type": text}, "vision_config": {"model_type": vision}}
    data |= {"model_type": "llava", "vision_feature_select_strategy": "full"}
    theirs = transformers.LlavaConfig(
        text_config=transformers.AutoConfig.for_model(text),
        vision_config=transformers.AutoConfig.for_model(vision),
        vision_feature_select_strategy="full",
    )
    assert llava_from_hf(data) == llava_from_hf(theirs.to_dict())


def test_parts_left_out_are_those_of_transformers():
    assert llava_from_hf({"model_type": "llava"}) == llava_from_hf(transformers.LlavaConfig().to_dict())


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ({}, "vicuna_v1"),
        ({"vocab_size": 128256}, "llama_3"),
        ({"model_type": "mistral"}, "mistral_instruct"),
        ({"model_type": "qwen2"}, "qwen"),
        ({"model_type": "qwen3"}, "qwen"),
    ],
)
def test_the_template_is_what_llava_used_with_such_a_language_model(text, template):
    assert llava_from_hf(HF_7B | {"text_config": text}).template == template


def test_a_qwen2_without_special_tokens_has_none():
    config = llava_from_hf(HF_7B | {"text_config": {"model_type": "qwen2"}})
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_an_original_siglip_tower_has_no_class_token_to_select(feature):
    data = ORIGINAL_7B | {"mm_hidden_size": 32, "mm_vision_select_feature": feature}
    assert not llava_from_hf(data, vision=SIGLIP).keep_class_token


def test_a_config_that_transformers_writes_says_the_same_as_a_short_one():
    long = transformers.LlavaConfig.from_dict(HF_7B).to_dict()
    assert llava_from_hf(long) == llava_from_hf(HF_7B)


def test_both_names_of_the_image_token():
    data = {key: value for key, value in HF_7B.items() if key != "image_token_index"}
    assert llava_from_hf(data | {"image_token_id": 7}).image_token_id == 7


def test_a_hugging_face_model_pads_if_its_processor_does():
    assert llava_from_hf(HF_7B, preprocessor={"do_pad": True}).image_aspect == "pad"
    assert llava_from_hf(HF_7B, preprocessor={"do_pad": False}).image_aspect == "square"


def test_end_tokens_of_the_generation_config_win():
    assert llava_from_hf(HF_7B, generation={"eos_token_id": [2, 9]}).eos_token_ids == (2, 9)
    assert llava_from_hf(HF_7B | {"text_config": {"eos_token_id": 5}}).eos_token_ids == (5,)


def test_the_schedule_is_the_papers_where_it_fits():
    assert llava_from_hf(HF_7B).schedule == DropSchedule(positions="dense")
    assert not llava_from_hf(HF_7B, schedule=DropSchedule.none()).schedule.layers
    short = HF_7B | {"text_config": HF_7B["text_config"] | {"num_hidden_layers": 24}}
    assert not llava_from_hf(short).schedule.layers


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_projectors_of_the_original_code(kind, layers):
    assert llava_from_hf(ORIGINAL_7B | {"mm_projector_type": kind}).projector_layers == layers


def test_defaults_of_the_original_code():
    data = dict(ORIGINAL_7B)
    for key in ("mm_projector_type", "image_aspect_ratio", "mm_vision_select_feature", "mm_use_im_start_end"):
        del data[key]
    config = llava_from_hf(data)
    assert (config.projector_layers, config.image_aspect, config.keep_class_token) == (1, "square", False)


def test_the_recorded_original_model_takes_its_tower_from_a_folder():
    data = json.loads((GOLDEN / "model_mha" / "config.json").read_text())
    vision = vision_from_hf(json.loads((GOLDEN / "clip_tower" / "config.json").read_text()))
    config = llava_from_hf(data, vision=vision)
    assert (config.vision, config.image_tokens, config.image_aspect) == (vision, 16, "pad")


def test_a_llava_next_video_averages_its_frames_before_the_projector():
    data = HF_7B | {"model_type": "llava_next_video", "image_grid_pinpoints": [[336, 672]]}
    config = llava_from_hf({key: value for key, value in data.items() if key != "image_token_index"})
    assert (config.frame_stride, config.frame_tokens) == (2, 144)
    assert (config.image_token_id, config.video_token_id) == (32001, 32000)
    assert llava_from_hf(data | {"spatial_pool_stride": 5}).frame_tokens == 16
    theirs = transformers.LlavaNextVideoConfig.from_dict(hf_config(config, "float32"))
    assert llava_from_hf(theirs.to_dict()) == config
    with pytest.raises(UserError, match=r"a LLaVA-NeXT-Video model can be exported .* --format hf"):
        original_config(config, "float32")


@pytest.mark.parametrize("config", [OTHER, LlavaConfig.llava_1_5_13b(), QWEN2, MISTRAL])
def test_a_config_survives_both_formats(config):
    original = original_config(config, "float32")
    assert llava_from_hf(original, vision=config.vision, schedule=config.schedule) == config
    theirs = with_image_token(config)
    preprocessor = {"do_pad": config.image_aspect == "pad"}
    data = transformers.LlavaConfig.from_dict(hf_config(theirs, "float32")).to_dict()
    assert llava_from_hf(data, preprocessor=preprocessor, schedule=config.schedule) == theirs


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (
            ORIGINAL_7B,
            {"model_type": "llava_mpt"},
            "'llava_mpt' is not supported, expected llava_llama or llava_mistral or llava_qwen or",
        ),
        (ORIGINAL_7B, {"image_aspect_ratio": "anyres"}, "image_aspect_ratio anyres, mm_patch_merge_type 'flat'"),
        (ORIGINAL_7B, ANYRES, r"tiled into \[\]: each side must be a multiple of the 336 pixels"),
        (ORIGINAL_7B, ANYRES | {"image_grid_pinpoints": [[336, 500]]}, r"tiled into \[\(500, 336\)\]"),
        (ORIGINAL_7B, ANYRES | {"image_grid_pinpoints": "(1x1)"}, "'\\(1x1\\)' is not a list of resolutions"),
        (ORIGINAL_7B, {"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad'"),
        (ORIGINAL_7B, {"mm_projector_type": "identity"}, "'identity' is not supported, expected linear or mlp2x_gelu"),
        (ORIGINAL_7B, {"mm_projector_type": "mlp0x_gelu"}, "mlp0x_gelu"),
        (ORIGINAL_7B, {"mm_vision_select_feature": "pooled"}, "patch or cls_patch"),
        (ORIGINAL_7B, {"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        (ORIGINAL_7B, {"mm_hidden_size": 768}, "mm_hidden_size is 768 .* hidden_size 1024"),
        (ORIGINAL_7B, {"mm_vision_tower": "somebody/tower"}, "'somebody/tower' was not found: .* --vision DIR"),
        (ORIGINAL_7B, {"mm_vision_select_layer": -30}, "names no hidden state"),
        (HF_7B, {"model_type": "llava_next"}, "tiled into"),
        (HF_7B, {"model_type": "llava_next_video", "spatial_pool_mode": "conv"}, "spatial_pool_mode 'conv' is not sup"),
        (
            HF_7B,
            {"model_type": "llava_next_video", "spatial_pool_mode": "max"},
            "'max' is not supported, expected",
        ),
        (
            HF_7B,
            {"model_type": "llava_next_video", "spatial_pool_stride": 30, "image_grid_pinpoints": [[336, 672]]},
            "frames of 24 features a side cannot be averaged over 30",
        ),
        (HF_7B, {"projector_hidden_act": "relu"}, "'relu'"),
        (HF_7B, {"multimodal_projector_bias": False}, "multimodal_projector_bias"),
        (HF_7B, {"vision_feature_layer": [-2, -5]}, "only a single layer"),
        (HF_7B, {"vision_feature_select_strategy": "cls"}, "default or full"),
        (
            HF_7B,
            {"text_config": {"model_type": "gemma"}},
            "'gemma' is not supported, expected llama or mistral",
        ),
        (
            HF_7B,
            {"vision_config": {"model_type": "dinov2"}},
            "'dinov2' is not supported, expected clip_vision_model",
        ),
        (
            HF_7B,
            {"vision_config": {"model_type": "siglip_vision_model"}},
            "'default' removes .* siglip tower has none",
        ),
    ],
)
def test_what_is_not_supported_is_refused(base, change, message):
    with pytest.raises(UserError, match=message) as caught:
        llava_from_hf(base | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["mm_vision_select_layer", "mm_hidden_size"])
def test_an_original_config_without_its_vision_keys_is_refused(key):
    with pytest.raises(UserError, match=f"has no {key}"):
        llava_from_hf({name: value for name, value in ORIGINAL_7B.items() if name != key})
