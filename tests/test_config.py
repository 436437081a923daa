"""Configs: JSON round trip, both kinds of source, and what is refused."""

import dataclasses
import json

import pytest

from pdrop_jax.config import LlavaConfig, RopeScaling, TextConfig, Tiling, VisionConfig
from pdrop_jax.convert.hf_parts import (
    rope_scaling_from_hf,
    rope_scaling_to_hf,
    text_from_hf,
    text_to_hf,
    vision_from_hf,
    vision_to_hf,
)
from pdrop_jax.convert.hf_schema import Rope
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
PLAIN_ROPE = TextConfig(99, 32, 48, 6, 4, 2, 16, 5e5, LLAMA3, 1e-4, True, True, True, 77, "qwen2", 5)
UNUSUAL = LlavaConfig(
    vision=VisionConfig(28, 14, 32, 64, 3, 4, 1e-4, "gelu"),
    text=dataclasses.replace(
        PLAIN_ROPE,
        qk_norm=True,
        mrope_sections=(2, 3, 3),
        mrope_interleaved=True,
        norm_plus_one=True,
        post_norms=True,
        activation="gelu_tanh",
        scaled_embeddings=True,
        query_scalar=9,
        full_layers=(2, 5),
        local_rope_theta=7.0,
        two_way_images=True,
    ),
    schedule=DropSchedule((1, 4), (0.3, 0.1), "original"),
    projector_layers=1,
    select_layer=-1,
    keep_class_token=True,
    image_aspect="pad",
    template="plain",
    image_token_id=98,
    video_token_id=97,
    frame_stride=2,
    bos_token_id=3,
    eos_token_ids=(4, 5),
)
SIGLIP = VisionConfig(28, 14, 32, 64, 3, 4, 1e-4, "gelu_tanh", "siglip", True)
NO_BOS = LlavaConfig(SIGLIP, TextConfig(sliding_window=7, family="mistral"), bos_token_id=None, eos_token_ids=())
TILED = LlavaConfig(SIGLIP, tiling=Tiling(((28, 56), (84, 28)), max_tiles=3, rounded=True, alone=True, choice="aspect"))
LLAMA = dataclasses.replace(PLAIN_ROPE, family="llama", sliding_window=None)
MISTRAL = dataclasses.replace(PLAIN_ROPE, family="mistral", qkv_bias=False, output_bias=False)
QWEN2 = dataclasses.replace(PLAIN_ROPE, output_bias=False)


def differing_fields(a, b):
    return [field.name for field in dataclasses.fields(a) if getattr(a, field.name) != getattr(b, field.name)]


def test_every_field_of_the_unusual_config_differs_from_its_default():
    # Not with classes: tiling, and standby tokens (tests/model/test_standby.py).
    assert len(differing_fields(UNUSUAL, LlavaConfig())) == len(dataclasses.fields(LlavaConfig)) - 2
    assert len(differing_fields(TILED.tiling, Tiling.next())) == len(dataclasses.fields(Tiling))
    # A cache's dtype is chosen when a model is loaded, and not saved.
    assert len(differing_fields(UNUSUAL.text, TextConfig())) == len(dataclasses.fields(TextConfig)) - 1
    # 28 pixels are 2 x 2 patches of 14; only a CLIP tower has a class token to keep.
    # The next four are InternViT's, whose configs tests/families/test_tile_checkpoints.py compares, and the last two
    # LLaVA-UHD v4's: tests/model/test_compression.py.
    kept = {"patch_size", "kind", "pooling_head", "qkv_bias", "layer_scale", "rms_norm", "qk_norm"}
    kept |= {"early_compression", "merge_size"}
    assert len(differing_fields(UNUSUAL.vision, VisionConfig())) == len(dataclasses.fields(VisionConfig)) - len(kept)


@pytest.mark.parametrize("config", [UNUSUAL, NO_BOS, TILED, LlavaConfig.llava_1_5_7b(), LlavaConfig.llava_next_13b()])
def test_json_round_trip(config):
    assert LlavaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_saved_config_is_loaded_with_its_schedule(tmp_path):
    UNUSUAL.save(tmp_path)
    assert LlavaConfig.load(tmp_path) == UNUSUAL


def test_a_config_is_hashable():
    assert hash(UNUSUAL) == hash(dataclasses.replace(UNUSUAL))


@pytest.mark.parametrize("config", [VisionConfig(), UNUSUAL.vision, SIGLIP])
def test_vision_config_survives_hugging_face(config):
    assert vision_from_hf(vision_to_hf(config)) == config


@pytest.mark.parametrize(
    "config",
    [TextConfig(), LLAMA, MISTRAL, QWEN2, *(dataclasses.replace(x, sliding_window=None) for x in (MISTRAL, QWEN2))],
)
def test_text_config_survives_hugging_face(config):
    assert text_from_hf(text_to_hf(config)) == config


@pytest.mark.parametrize("scaling", [LLAMA3, RopeScaling("linear", 2.0)])
def test_rope_scaling_survives_hugging_face(scaling):
    assert rope_scaling_from_hf(Rope(**rope_scaling_to_hf(scaling))) == scaling


def test_rope_is_read_from_the_names_of_both_transformers_generations():
    old = text_from_hf({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}})
    new = text_from_hf({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2}})
    assert old == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, RopeScaling("linear", 2.0))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_config_of_a_tower_with_its_text_half_lends_its_vision_part(kind):
    found = vision_from_hf({"model_type": kind, "vision_config": {"image_size": 64}})
    assert (found.image_size, found.kind) == (64, kind)


def test_mistral_slides_unless_it_is_told_not_to():
    assert text_from_hf({"model_type": "mistral"}).sliding_window == 4096
    assert text_from_hf({"model_type": "mistral", "sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    ("data", "window"),
    [
        ({}, None),
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 9}, 9),
        ({"use_sliding_window": True, "max_window_layers": 32}, None),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 32}, 4096),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 32}, None),
    ],
)
def test_qwen2_slides_if_it_is_told_to(data, window):
    assert text_from_hf({"model_type": "qwen2"} | data).sliding_window == window


def test_a_window_in_some_layers_only_is_refused():
    data = {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 28}
    with pytest.raises(UserError, match="max_window_layers is 28 of 32 layers: a sliding window in some layers only"):
        text_from_hf(data)


def test_a_window_that_hides_the_token_itself_is_refused():
    with pytest.raises(UserError, match="sliding_window is 0: a token sees at least itself"):
        TextConfig(sliding_window=0)


def test_siglip_has_no_class_token():
    assert (SIGLIP.num_patches, SIGLIP.class_tokens, LlavaConfig(SIGLIP, select_layer=-1).image_tokens) == (4, 0, 4)
    with pytest.raises(UserError, match="a siglip tower has no class token to keep"):
        LlavaConfig(SIGLIP, keep_class_token=True)


def test_key_value_heads_default_to_the_attention_heads():
    assert text_from_hf({"num_attention_heads": 8, "num_key_value_heads": None}).num_kv_heads == 8


def test_head_dim_defaults_to_its_share_of_the_model():
    assert text_from_hf({"num_attention_heads": 8, "hidden_size": 64}).head_dim == 8


@pytest.mark.parametrize(("select_layer", "layers"), [(-1, 24), (-2, 23), (-24, 1), (5, 5), (24, 24)])
def test_the_selected_hidden_state_names_the_layers_that_run(select_layer, layers):
    assert LlavaConfig(select_layer=select_layer).vision_layers == layers


@pytest.mark.parametrize("select_layer", [0, 25, -25])
def test_a_select_layer_outside_the_tower_is_refused(select_layer):
    with pytest.raises(UserError, match=f"select_layer {select_layer} names no hidden state"):
        LlavaConfig(select_layer=select_layer)


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(UserError, match="6 attention heads are not a multiple of 4 key-value heads"):
        TextConfig(num_heads=6, num_kv_heads=4)


def test_a_schedule_that_does_not_fit_the_decoder_is_refused():
    with pytest.raises(UserError, match="drop after layer 24 in a decoder of 4 layers"):
        LlavaConfig(text=TextConfig(num_layers=4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"model_type": "gemma"}, "language model_type 'gemma' is not supported, expected llama or mistral or qwen2"),
    ],
)
def test_an_unsupported_language_model_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        text_from_hf(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"model_type": "dinov2"},
            "vision model_type 'dinov2' is not supported, expected clip_vision_model",
        ),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_an_unsupported_vision_tower_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        vision_from_hf(data)


@pytest.mark.parametrize(
    "config",
    [
        TextConfig(qkv_bias=True),
        TextConfig(sliding_window=4),
        dataclasses.replace(MISTRAL, qkv_bias=True, output_bias=True),
        dataclasses.replace(QWEN2, output_bias=True),
        dataclasses.replace(QWEN2, qkv_bias=False),
    ],
)
def test_what_a_family_does_not_have_cannot_be_exported(config):
    with pytest.raises(UserError, match=f"a {config.family} model with .* cannot be exported"):
        text_to_hf(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a checkpoint: it has no config.json"),
        ("{", "config.json is malformed"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "llava"}', "must be converted first, pdrop convert SRC OUT"),
    ],
)
def test_a_folder_without_our_config_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        LlavaConfig.load(tmp_path)
