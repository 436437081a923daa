"""Every value of Gemma 3's files replaced by what it must not be: one line, or something valid."""

import json

from mutations import check_config, check_own_config, image_processor_refusals, refusals
from test_gemma_checkpoints import HUB_4B
from tiny_gemma import PAN_AND_SCAN, photo

from pdrop_jax.config import LlavaConfig, config_of
from pdrop_jax.convert.hf_config import hf_config, llava_from_hf


def test_every_key_of_a_foreign_config():
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_theta": 1e4}}
    new = HUB_4B | {"text_config": HUB_4B["text_config"] | {"rope_scaling": None, "rope_parameters": ropes}}
    for data in (HUB_4B, new, hf_config(config_of("gemma-3-4b"), "bfloat16")):
        assert isinstance(llava_from_hf(data), LlavaConfig)
        assert refusals(data, check_config) > 200


def test_every_key_of_our_own_config():
    assert refusals(config_of("gemma-3-4b").to_json(), check_own_config) > 400


def test_every_setting_of_the_image_processor(gemma, tmp_path):
    settings = json.loads((gemma[1] / "preprocessor_config.json").read_text()) | PAN_AND_SCAN
    assert image_processor_refusals(settings, tmp_path, LlavaConfig.load(gemma[1]), photo(30, 40)) > 80
