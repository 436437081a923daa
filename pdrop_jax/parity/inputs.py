"""Preprocessing cases of ``pdrop check``: images, prompts and training rows."""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from pdrop_jax.config import LlavaConfig, Tiling, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import grid_shape, token_table, unpadded
from pdrop_jax.inputs.chat_template import TEMPLATES, render, token_ids
from pdrop_jax.inputs.images import as_tokens, open_image
from pdrop_jax.inputs.targets import tokenize, training_text, turns_of
from pdrop_jax.inputs.tokenizer import load_tokenizer
from pdrop_jax.parity.report import Comparison, Figures, error

BLOCK = 28  # pixels; side length of the blocks whose means are recorded
CORNER = 32  # pixels; side length of the recorded patches


def image_preprocess(folder: pathlib.Path, info: Any, arrays: Mapping[str, np.ndarray], _load: Any) -> Comparison:
    """Compares the pixels of the images beside the vectors, whole and tiled, and the tiling of the recorded sizes."""
    settings = {name: value for name, value in info["processor"].items() if name != "image_processor_type"}
    size = settings["crop_size"]["height"]
    tiling = Tiling(tuple((height, width) for width, height in info["image_grid_pinpoints"]))
    config = LlavaConfig(vision=VisionConfig(image_size=size), tiling=tiling)
    clip = CLIPImageProcessorPil(**settings)
    modes = {
        "pad": (clip, dataclasses.replace(config, image_aspect="pad", tiling=None)),
        "square": (clip, dataclasses.replace(config, image_aspect="square", tiling=None)),
        "anyres": (
            LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=list(map(list, tiling.pinpoints))),
            config,
        ),
    }
    found = [_compare_sizes(config, arrays)]
    for name, picture in info["images"].items():
        if picture["file"] is None:
            continue
        image = open_image(folder / picture["file"])
        for mode, (processor, own) in modes.items():
            found.append(_compare_pixels(as_tokens(image, processor, own).crops, f"{name}.{mode}", arrays))
    return Comparison.worst(info["case"], found)


def _compare_sizes(config: LlavaConfig, arrays: Mapping[str, np.ndarray]) -> Figures:
    """Compares the grid of tiles, its part without padding and the number of tokens for the recorded image sizes."""
    tiling, tile, side = config.tiling, config.crop_tower.image_size, config.crop_tower.patches_a_side
    assert tiling
    equal = []
    for n, (width, height) in enumerate(arrays["sizes_wh"].tolist()):
        rows, columns = grid_shape((height, width), tiling, tile)
        covered = unpadded((height, width), (rows * side, columns * side), tiling)
        tokens, _ = token_table((height, width), tiling, tile, side)
        equal += [
            [columns * tile, rows * tile] == arrays["best_resolution_wh"][n].tolist(),
            [columns, rows] == arrays["grid_shape_wh"][n].tolist(),
            [x.stop - x.start for x in covered] == arrays["unpadded_hw"][n].tolist(),
            len(tokens) == arrays["num_image_tokens_spatial_unpad"][n],
        ]
    return {"tokens": all(equal)}


def _compare_pixels(crops: np.ndarray, key: str, arrays: Mapping[str, np.ndarray]) -> Figures:
    """Compares statistics and patches of ``crops`` (P, h, w, 3) with the recorded ones."""
    pixels = crops.transpose(0, 3, 1, 2)
    P, C, h, w = pixels.shape
    if [P, C, h, w][-len(arrays[f"{key}.shape"]) :] != arrays[f"{key}.shape"].tolist():
        return {"pixels": float("inf")}
    middle = slice((h - CORNER) // 2, (h + CORNER) // 2)
    blocks = pixels.reshape(P, C, h // BLOCK, BLOCK, w // BLOCK, BLOCK).mean((3, 5))
    exact = pixels.astype(np.float64)  # the error of a float32 sum over 100,000 pixels exceeds the tolerance
    figures = {
        "mean": error(exact.mean((2, 3)), arrays[f"{key}.mean"]),
        "std": error(exact.std((2, 3)), arrays[f"{key}.std"]),
        "blockmean28": error(blocks, arrays[f"{key}.blockmean28"]),
        "corner_tl": _half_error(pixels[..., :CORNER, :CORNER], arrays[f"{key}.corner_tl"]),
        "center": _half_error(pixels[..., middle, middle], arrays[f"{key}.center"]),
    }
    return {"pixels": max(figures.values())}


def _half_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest absolute difference beyond the rounding error of the recorded float16."""
    if ours.shape != theirs.shape:
        return float("inf")
    rounding = np.spacing(np.abs(theirs)).astype(np.float32) / 2
    return float(np.maximum(np.abs(ours - theirs.astype(np.float32)) - rounding, 0).max())


def prompts(_folder: pathlib.Path, info: Any, _arrays: Any, _load: Any) -> Comparison:
    """Compares the text of the supported templates, with and without the last answer."""
    turns = [tuple(turn) for turn in info["turns"]]
    found = []
    for name, recorded in info["templates"].items():
        if name not in TEMPLATES:
            continue
        texts = {
            "full_2_turns": turns,
            "generation_prompt_turn1": [(turns[0][0], None)],
            "generation_prompt_turn2": [turns[0], (turns[1][0], None)],
        }
        # For "plain" with two turns an error is recorded instead of a text.
        found += [{"text": render(turns, name) == recorded[key]} for key, turns in texts.items() if key in recorded]
    return Comparison.worst(info["case"], found)


def preprocess_masks(folder: pathlib.Path, info: Any, arrays: Mapping[str, np.ndarray], _load: Any) -> Comparison:
    """Compares ids and targets of conversations; the tokenizer is in ``folder``/tokenizer, with both ``legacy``."""
    found: list[Figures] = []
    for legacy in (False, True):
        tokenizer = _llama_tokenizer(folder / "tokenizer/tokenizer.model", legacy, info["tokenizer"])
        for sample in info["samples"]:
            if sample["legacy"] != legacy:
                continue
            text = training_text(turns_of(sample["conversations"]), sample["template"])
            (example,) = tokenize(tokenizer, [text], sample["template"])
            ids, labels = arrays[f"{sample['key']}.input_ids"], arrays[f"{sample['key']}.labels"]
            found.append({"tokens": np.array_equal(example.ids, ids), "labels": np.array_equal(example.labels, labels)})
        for name, text in info.get("tokenizer_image_token_texts", {}).items():
            recorded = arrays[f"tokenizer_image_token.{name}.legacy{int(legacy)}"]
            found.append({"tokens": token_ids(tokenizer, text) == recorded.tolist()})
    return Comparison.worst(info["case"], found)


def _llama_tokenizer(model: pathlib.Path, legacy: bool, info: Any) -> Any:
    if not model.exists():
        raise UserError(f"{model} is missing: copy {info['file']} to that path")
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": info["add_bos_token"], **tokens}
    with tempfile.TemporaryDirectory() as temporary:
        beside = pathlib.Path(temporary)
        (beside / model.name).symlink_to(model.resolve())
        (beside / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(beside)
