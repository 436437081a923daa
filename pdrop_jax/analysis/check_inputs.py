"""The host's side of ``pdrop check``: pictures, prompts and training rows."""

import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pdrop_jax.analysis.report import Figures, Row, error
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.conversation import TEMPLATES, load_tokenizer, render, token_ids
from pdrop_jax.inputs.images import open_image, to_crop
from pdrop_jax.inputs.targets import tokenize, training_text, turns_of

BLOCK = 28  # pixels, side of the blocks whose means are recorded
CORNER = 32  # pixels, side of the recorded patches


def image_preprocess(folder: pathlib.Path, info: Any, arrays: Mapping[str, np.ndarray], _load: Any) -> Row:
    """Pixels of the pictures that lie beside the vectors, in the modes pad and square."""
    settings = {name: value for name, value in info["processor"].items() if name != "image_processor_type"}
    processor = CLIPImageProcessorPil(**settings)
    found = []
    for name, picture in info["images"].items():
        if picture["file"] is None:
            continue
        image = open_image(folder / picture["file"])
        for mode in ("pad", "square"):
            found.append(_compare_pixels(image, processor, mode, f"{name}.{mode}", arrays))
    return Row.worst(info["case"], found)


def _compare_pixels(
    image: Image.Image, processor: CLIPImageProcessorPil, mode: Any, key: str, arrays: Mapping[str, np.ndarray]
) -> Figures:
    pixels = to_crop(image, processor, mode).transpose(2, 0, 1)  # (3, h, w)
    C, h, w = pixels.shape
    if [C, h, w] != arrays[f"{key}.shape"].tolist():
        return {"pixels": float("inf")}
    middle = slice((h - CORNER) // 2, (h + CORNER) // 2)
    blocks = pixels.reshape(C, h // BLOCK, BLOCK, w // BLOCK, BLOCK).mean((2, 4))
    exact = pixels.astype(np.float64)  # a float32 sum of 100,000 pixels is off by more than the tolerance
    figures = {
        "mean": error(exact.mean((1, 2)), arrays[f"{key}.mean"][0]),
        "std": error(exact.std((1, 2)), arrays[f"{key}.std"][0]),
        "blockmean28": error(blocks, arrays[f"{key}.blockmean28"][0]),
        "corner_tl": _half_error(pixels[:, :CORNER, :CORNER], arrays[f"{key}.corner_tl"][0]),
        "center": _half_error(pixels[:, middle, middle], arrays[f"{key}.center"][0]),
    }
    return {"pixels": max(figures.values())}


def _half_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference beyond what rounding to float16 explains."""
    if ours.shape != theirs.shape:
        return float("inf")
    rounding = np.spacing(np.abs(theirs)).astype(np.float32) / 2
    return float(np.maximum(np.abs(ours - theirs.astype(np.float32)) - rounding, 0).max())


def prompts(_folder: pathlib.Path, info: Any, _arrays: Any, _load: Any) -> Row:
    """Text of the templates that are ours, with and without the last answer."""
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
        # "plain" records an error for two turns.
        found += [{"text": render(turns, name) == recorded[key]} for key, turns in texts.items() if key in recorded]
    return Row.worst(info["case"], found)


def preprocess_masks(folder: pathlib.Path, info: Any, arrays: Mapping[str, np.ndarray], _load: Any) -> Row:
    """Ids and targets of conversations; the tokenizer in ``folder``/tokenizer, with both settings of ``legacy``."""
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
    return Row.worst(info["case"], found)


def _llama_tokenizer(model: pathlib.Path, legacy: bool, info: Any) -> Any:
    if not model.exists():
        raise UserError(f"{model} is missing: it is {info['file']}")
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": info["add_bos_token"], **tokens}
    with tempfile.TemporaryDirectory() as temporary:
        beside = pathlib.Path(temporary)
        (beside / model.name).symlink_to(model.resolve())
        (beside / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(beside)
