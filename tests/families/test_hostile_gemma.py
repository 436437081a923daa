"""Every value of Gemma 3's files replaced by what it must not be: one line, or something valid."""

import json

import numpy as np
from mutations import mutations, one_line
from test_gemma_checkpoints import HUB_4B
from tiny_gemma import PAN_AND_SCAN, photo

from pdrop_jax.config import LlavaConfig, config_of
from pdrop_jax.convert.hf_config import hf_config, llava_from_hf
from pdrop_jax.inputs.images import as_tokens, load_image_processor


def test_every_key_of_a_foreign_config():
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_theta": 1e4}}
    new = HUB_4B | {"text_config": HUB_4B["text_config"] | {"rope_scaling": None, "rope_parameters": ropes}}
    for data in (HUB_4B, new, hf_config(config_of("gemma-3-4b"), "bfloat16")):
        assert isinstance(llava_from_hf(data), LlavaConfig)
        refused = 0
        for path, value, changed in mutations(data):
            with one_line((path, value)) as said:
                config = llava_from_hf(changed)
                assert LlavaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config, (path, value)
            refused += len(said)
        assert refused > 200


def test_every_key_of_our_own_config():
    refused = 0
    for path, value, changed in mutations(config_of("gemma-3-4b").to_json()):
        with one_line((path, value)) as said:
            LlavaConfig.from_json(changed)
        refused += len(said)
    assert refused > 400


def test_every_setting_of_the_image_processor(gemma, tmp_path):
    config = LlavaConfig.load(gemma[1])
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads((gemma[1] / path.name).read_text()) | PAN_AND_SCAN
    refused = 0
    for where, value, changed in mutations(settings):
        path.write_text(json.dumps(changed))
        with one_line((where, value)) as said:
            found = as_tokens(photo(30, 40), load_image_processor(tmp_path, config), config)
            assert np.isfinite(found.crops).all(), (where, value)
        refused += len(said)
    assert refused > 80
