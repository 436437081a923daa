"""Every value of the files of a model with tiles replaced by what it must not be: one line, or something valid."""

import json

import pytest
from mutations import check_config, check_own_config, image_processor_refusals, refusals
from test_tile_checkpoints import HUB
from tiny_tiles import photo

from pdrop_jax.config import LlavaConfig, config_of
from pdrop_jax.convert.hf_config import hf_config


@pytest.mark.parametrize("name", HUB)
def test_every_key_of_a_foreign_config(name):
    for data in (HUB[name], hf_config(config_of(name), "bfloat16")):
        assert refusals(data, check_config) > 100


@pytest.mark.parametrize("name", HUB)
def test_every_key_of_our_own_config(name):
    assert refusals(config_of(name).to_json(), check_own_config) > 300


@pytest.mark.parametrize("kind", ["internvl", "smolvlm"])
def test_every_setting_of_the_image_processor(kind, tiles, tmp_path):
    settings = json.loads((tiles[kind][1] / "preprocessor_config.json").read_text())
    assert image_processor_refusals(settings, tmp_path, LlavaConfig.load(tiles[kind][1]), photo(30, 40)) > 80
