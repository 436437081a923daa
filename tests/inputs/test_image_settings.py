"""preprocessor_config.json with each value replaced by bad ones: a one-line error, or finite pixel values."""

import json

import numpy as np
import pytest
from mutations import mutations, one_line
from PIL import Image

from pdrop_jax.config import LlavaConfig, Tiling, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.images import as_tokens, load_image_processor

COLOURS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48, 0.45, 0.4],
    "image_std": [0.26, 0.26, 0.27],
    "image_processor_type": "CLIPImageProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
}
CLIP = COLOURS | {"crop_size": {"height": 28, "width": 28}, "do_center_crop": True, "size": {"shortest_edge": 28}}
SIGLIP = COLOURS | {"size": {"height": 28, "width": 28}, "do_center_crop": None, "crop_size": None}
TOWER = VisionConfig(28, 14, 32, 64, 3, 4)
CASES = {
    "clip": (LlavaConfig(TOWER), CLIP),
    "siglip": (LlavaConfig(VisionConfig(28, 14, 32, 64, 3, 4, kind="siglip")), SIGLIP),
    "tiled": (LlavaConfig(TOWER, tiling=Tiling(((28, 56),))), CLIP | {"image_grid_pinpoints": [[28, 56]]}),
}


def crops(folder, config, settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    picture = Image.new("RGB", (40, 30), (9, 8, 7))
    return as_tokens(picture, load_image_processor(folder, config), config).crops


@pytest.mark.parametrize("case", CASES)
def test_every_setting(case, tmp_path):
    config, settings = CASES[case]
    assert crops(tmp_path, config, settings).shape[1:] == (28, 28, 3)
    refused = 0
    for path, value, changed in mutations(settings):
        with one_line((path, value)) as said:
            assert np.isfinite(crops(tmp_path, config, changed)).all(), (path, value)
        refused += len(said)
    assert refused > 150


def test_the_line_names_file_key_and_value(tmp_path):
    config, settings = CASES["clip"]
    with pytest.raises(UserError, match=r"preprocessor_config\.json: image_std\.1 is 0, it must be greater than or"):
        crops(tmp_path, config, settings | {"image_std": [1, 0, 1]})


def test_the_image_processor_of_a_merged_file(tmp_path):
    config, settings = CASES["clip"]
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings | {"resample": -1}}))
    with pytest.raises(UserError, match=r"processor_config\.json: resample is -1"):
        load_image_processor(tmp_path, config)
