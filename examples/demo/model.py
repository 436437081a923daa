"""The demo's model: LLaVA's architecture with few, narrow layers, and the checkpoint that training starts from."""

import json
import math
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from examples.demo.tokenizer import TEMPLATE, learn_tokenizer, write_tokenizer
from pdrop_jax.checkpoint import UNUSED, save
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.model.params import Params, init_params, path_name
from pdrop_jax.schedule import DropSchedule

SCHEDULE = DropSchedule(layers=(4, 5, 6), ratios=(0.5, 0.25, 0.125))
PIXELS, PATCH = 168, 14  # a photo of the grid is 3x3 patches
MEAN, STD = 0.29, 0.35  # of the training photos' pixels
EMBEDDING_SCALE = 1.0  # standard deviation of a word embedding; init_params uses 0.02
POSITION_SCALE = 0.7  # of the sines; a patch embedding starts out with about 1


def demo_config(schedule: DropSchedule = SCHEDULE, vocab_size: int | None = None) -> LlavaConfig:
    """Args: vocab_size: of the tokenizer; None trains the tokenizer to find out."""
    D = 128
    return LlavaConfig(
        vision=VisionConfig(PIXELS, PATCH, hidden_size=D, intermediate_size=4 * D, num_layers=3, num_heads=4),
        text=TextConfig(
            vocab_size=learn_tokenizer().get_vocab_size() if vocab_size is None else vocab_size,
            hidden_size=D,
            intermediate_size=352,
            num_layers=8,
            num_heads=4,
            num_kv_heads=4,
            head_dim=D // 4,
            max_length=512,
        ),
        schedule=schedule,
        select_layer=-1,  # such a small vision tower needs all its layers
        image_aspect="pad",
        template=TEMPLATE,
    )


def demo_params(config: LlavaConfig, seed: int = 0) -> Params:
    """Random float32 parameters, scaled so that the layers do not drown a token's content and position.

    Word embeddings start as large as patches, layers add little (GPT-2's depth scaling), and the vision tower's
    position table is sinusoidal.
    """
    params = init_params(config, seed)
    params["embed"]["embedding"] *= EMBEDDING_SCALE / 0.02
    depths = {"vision": 2 * config.vision_layers, "stages": 2 * config.text.num_layers}

    def quieter(path: tuple, x: jax.Array) -> jax.Array:
        name = path_name(path)
        adds = name.endswith((".o.kernel", ".down.kernel"))
        return x / math.sqrt(depths[name.partition(".")[0]]) if adds else x

    params = jax.tree.map_with_path(quieter, params)
    table = position_table(config.vision.image_size // config.vision.patch_size, config.vision.hidden_size)
    params["vision"]["embed"]["position"] = jnp.asarray(table)
    return params


def position_table(side: int, D: int) -> np.ndarray:
    """(1 + side * side, D) float32: half of D encodes the row, half the column, as sines and cosines.

    The class token gets zeros. Wavelengths range from 4 patches, about one photo, to 8 times the picture.
    """
    shortest, longest = 4.0, 8.0 * side
    steps = np.arange(D // 4) / (D // 4 - 1)
    waves = shortest * (longest / shortest) ** steps
    angles = 2 * math.pi * np.arange(side)[:, None] / waves  # (side, D/4)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) * POSITION_SCALE * math.sqrt(2)  # (side, D/2)
    rows, columns = np.repeat(line, side, axis=0), np.tile(line, (side, 1))
    return np.concatenate([np.zeros((1, D)), np.concatenate([rows, columns], axis=1)]).astype(np.float32)


def write_start(folder: str | os.PathLike, schedule: DropSchedule = SCHEDULE, seed: int = 0) -> None:
    """Writes the untrained checkpoint.

    Raises:
      UserError: ``folder`` exists.
    """
    with tempfile.TemporaryDirectory() as name:
        files = pathlib.Path(name)
        config = demo_config(schedule, write_tokenizer(files))
        (files / "preprocessor_config.json").write_text(json.dumps(preprocessor(config.vision), indent=2) + "\n")
        # Arrays of the PyTorch tower that no layer here reads; the export needs them.
        norm = {"post_layernorm.weight": np.ones, "post_layernorm.bias": np.zeros}
        D = config.vision.hidden_size
        save_file({name: make(D, np.float32) for name, make in norm.items()}, files / UNUSED)
        save(folder, config, demo_params(config, seed), companions=files)


def preprocessor(vision: VisionConfig) -> dict:
    """Settings of a CLIP image processor for greyscale photos on black."""
    size = vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "do_convert_rgb": True,
    }
