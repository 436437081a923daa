"""Every value of Qwen-VL's files replaced by what it must not be: one line, or something valid."""

import json

import tiny_qwen
from mutations import check_config, check_own_config, image_processor_refusals, refusals
from test_qwen3 import HUB_8B
from test_qwen_checkpoints import HUB_2_5

from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hf_config import llava_from_hf

VISION = {"depth": 2, "embed_dim": 32, "mlp_ratio": 4, "num_heads": 2, "hidden_size": 64, "hidden_act": "quick_gelu"}
NESTED = {
    "model_type": "qwen2_vl",
    "text_config": HUB_2_5
    | {"hidden_size": 64, "num_attention_heads": 4, "rope_scaling": None}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
    "vision_config": VISION | {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
    "image_token_id": 151655,
    "tie_word_embeddings": False,
}


def test_every_key_of_a_foreign_config():
    for data in (HUB_2_5, NESTED, HUB_8B):
        assert isinstance(llava_from_hf(data), LlavaConfig)
        assert refusals(data, check_config) > 300


def test_every_key_of_our_own_config():
    configs = LlavaConfig.qwen2_5_vl("7b"), LlavaConfig.qwen3_vl("8b")
    assert sum(refusals(config.to_json(), check_own_config) for config in configs) > 800


def test_every_setting_of_the_image_processor(folders, tmp_path):
    folder = folders["qwen2_5_vl"][1]
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert image_processor_refusals(settings, tmp_path, LlavaConfig.load(folder), tiny_qwen.photo(30, 40)) > 100
