"""Configs: JSON round trip, both kinds of source, and what is refused."""

import dataclasses
import json

import pytest

from pdrop_jax.config import LlavaConfig, RopeScaling, TextConfig, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
UNUSUAL = LlavaConfig(
    vision=VisionConfig(28, 14, 32, 64, 3, 4, 1e-4, "gelu"),
    text=TextConfig(99, 32, 48, 6, 4, 2, 16, 5e5, LLAMA3, 1e-4, True, True, True, 77),
    schedule=DropSchedule((1, 4), (0.3, 0.1), "original"),
    projector_layers=1,
    select_layer=-1,
    keep_class_token=True,
    image_aspect="pad",
    template="plain",
    image_token_id=98,
    bos_token_id=3,
    eos_token_ids=(4, 5),
)


def differing_fields(a, b):
    return [field.name for field in dataclasses.fields(a) if getattr(a, field.name) != getattr(b, field.name)]


def test_every_field_of_the_unusual_config_differs_from_its_default():
    assert len(differing_fields(UNUSUAL, LlavaConfig())) == len(dataclasses.fields(LlavaConfig))
    assert len(differing_fields(UNUSUAL.text, TextConfig())) == len(dataclasses.fields(TextConfig))
    kept = {"patch_size"}  # 28 pixels are 2 x 2 patches of 14
    assert len(differing_fields(UNUSUAL.vision, VisionConfig())) == len(dataclasses.fields(VisionConfig)) - len(kept)


@pytest.mark.parametrize("config", [UNUSUAL, LlavaConfig.llava_1_5_7b(), LlavaConfig.llava_1_5_13b()])
def test_json_round_trip(config):
    assert LlavaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_saved_config_is_loaded_with_its_schedule(tmp_path):
    UNUSUAL.save(tmp_path)
    assert LlavaConfig.load(tmp_path) == UNUSUAL


def test_a_config_is_hashable():
    assert hash(UNUSUAL) == hash(dataclasses.replace(UNUSUAL))


@pytest.mark.parametrize("config", [VisionConfig(), UNUSUAL.vision])
def test_vision_config_survives_hugging_face(config):
    assert VisionConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("config", [TextConfig(), UNUSUAL.text])
def test_text_config_survives_hugging_face(config):
    assert TextConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("scaling", [LLAMA3, RopeScaling("linear", 2.0)])
def test_rope_scaling_survives_hugging_face(scaling):
    assert RopeScaling.from_hf(scaling.to_hf()) == scaling


def test_rope_is_read_from_the_names_of_both_transformers_generations():
    old = TextConfig.from_hf({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}})
    new = TextConfig.from_hf({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2}})
    assert old == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, RopeScaling("linear", 2.0))


def test_a_clip_config_lends_its_vision_part():
    assert VisionConfig.from_hf({"model_type": "clip", "vision_config": {"image_size": 28}}).image_size == 28


def test_key_value_heads_default_to_the_attention_heads():
    assert TextConfig.from_hf({"num_attention_heads": 8, "num_key_value_heads": None}).num_kv_heads == 8


def test_head_dim_defaults_to_its_share_of_the_model():
    assert TextConfig.from_hf({"num_attention_heads": 8, "hidden_size": 64}).head_dim == 8


@pytest.mark.parametrize(("select_layer", "layers"), [(-1, 24), (-2, 23), (-24, 1), (5, 5), (24, 24)])
def test_the_selected_hidden_state_names_the_layers_that_run(select_layer, layers):
    assert LlavaConfig(select_layer=select_layer).vision_layers == layers


@pytest.mark.parametrize("select_layer", [0, 25, -25])
def test_a_select_layer_outside_the_tower_is_refused(select_layer):
    with pytest.raises(UserError, match=f"select_layer {select_layer} names no hidden state"):
        LlavaConfig(select_layer=select_layer)


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(UserError, match="6 attention heads cannot share 4 key-value heads"):
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
    ],
)
def test_an_unsupported_language_model_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        TextConfig.from_hf(data)


@pytest.mark.parametrize(
    ("data", "message"), [({"model_type": "siglip_vision_model"}, "siglip"), ({"hidden_act": "relu"}, "hidden_act")]
)
def test_an_unsupported_vision_tower_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        VisionConfig.from_hf(data)


def test_query_bias_without_output_bias_cannot_be_exported():
    with pytest.raises(UserError, match="cannot be exported"):
        TextConfig(qkv_bias=True).to_hf()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no checkpoint: it has no config.json"),
        ("{", "cannot be read"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "llava"}', "must be converted first, pdrop convert SRC OUT"),
    ],
)
def test_a_folder_without_our_config_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        LlavaConfig.load(tmp_path)
