"""Every value of Qwen-VL's files replaced by what it must not be: one line, or something valid."""

import json

import numpy as np
import tiny_qwen
from mutations import mutations, one_line
from test_qwen_checkpoints import HUB_2_5

from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hf_config import llava_from_hf
from pdrop_jax.inputs.images import as_tokens, load_image_processor

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
    for data in (HUB_2_5, NESTED):
        assert isinstance(llava_from_hf(data), LlavaConfig)
        refused = 0
        for path, value, changed in mutations(data):
            with one_line((path, value)) as said:
                config = llava_from_hf(changed)
                assert LlavaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config, (path, value)
            refused += len(said)
        assert refused > 300


def test_every_key_of_our_own_config():
    refused = 0
    for path, value, changed in mutations(LlavaConfig.qwen2_5_vl("7b").to_json()):
        with one_line((path, value)) as said:
            LlavaConfig.from_json(changed)
        refused += len(said)
    assert refused > 400


def test_every_setting_of_the_image_processor(folders, tmp_path):
    config = LlavaConfig.load(folders["qwen2_5_vl"][1])
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads((folders["qwen2_5_vl"][1] / path.name).read_text())
    refused = 0
    for where, value, changed in mutations(settings):
        path.write_text(json.dumps(changed))
        with one_line((where, value)) as said:
            found = as_tokens(tiny_qwen.photo(30, 40), load_image_processor(tmp_path, config), config)
            assert np.isfinite(found.crops).all(), (where, value)
        refused += len(said)
    assert refused > 100
