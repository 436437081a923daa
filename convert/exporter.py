"""pdrop-jax checkpoint -> a checkpoint for transformers or the original LLaVA code, one shard at a time."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from pdrop_jax import checkpoint
from pdrop_jax.checkpoint import storage
from pdrop_jax.config import LlavaConfig, VisionConfig
from pdrop_jax.convert.files import write_safetensors
from pdrop_jax.convert.hf_config import hf_config, namings_for, select_strategy, with_image_token
from pdrop_jax.convert.hf_parts import vision_to_hf
from pdrop_jax.convert.jinja import write_chat_template
from pdrop_jax.convert.names import NAMINGS, ONLY_HERE, TOWERS, Leaf, Naming, leaves, unrun_shapes
from pdrop_jax.convert.original_config import original_config, tower_folder
from pdrop_jax.convert.tensors import DTYPES, DType
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.tokenizer import reading
from pdrop_jax.io import read_json
from pdrop_jax.model.compression import is_compressed

Format = Literal["hf", "original"]
SHARD_BYTES = 2**29
TOWER_CLASSES = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


@dataclasses.dataclass(frozen=True)
class ExportSummary:
    """What an export wrote."""

    dtype: str
    tensors: int
    bytes: int


def export(model: pathlib.Path, out: pathlib.Path, format: Format, *, dtype: DType | None = None) -> ExportSummary:
    """Writes checkpoint ``model`` as PyTorch checkpoint ``out``: config.json, safetensors, tokenizer files.

    In format "hf" a chat template comes with the tokenizer: the model's own, or ours as Jinja.

    Peak memory is that of one shard (512 MiB, or one stack of ours if that is larger) twice.

    Args:
      format: "hf" is transformers' LlavaForConditionalGeneration, under the names that version 4 saves and 4 and 5
        load; "original" the original LLaVA code's, with the vision tower inside.
      dtype: None is that of the checkpoint.

    Raises:
      UserError: ``out`` exists, ``model`` is not a checkpoint or lacks what the format needs; nothing is written.
      OSError: the disk is full or may not be written; nothing is left behind.
    """
    config = LlavaConfig.load(model)
    if is_compressed(config):
        raise UserError(f"{ONLY_HERE}: use --format pdrop")
    dtype = dtype or checkpoint.abstract_arrays(model, config)["embed.embedding"].dtype.name
    linear = format == "original" and config.projector_layers == 1
    theirs = with_image_token(config) if format == "hf" else config
    data = hf_config(theirs, dtype) if format == "hf" else original_config(theirs, dtype)
    naming = namings_for(config)["original-linear" if linear else format]
    unrun = _unrun_tensors(model, config, naming, dtype)
    nbytes = sum(math.prod(leaf.shape) for leaf in leaves(config, naming)) * np.dtype(DTYPES[dtype]).itemsize
    with checkpoint.new_folder(out, nbytes) as new:
        with checkpoint.locally(new) as place:
            checkpoint.copy_files(model, place, checkpoint.COMPANIONS)
            if format == "hf":
                write_chat_template(place, config.template)
            if format == "hf" and config.image_token_id is None:
                _complete_processor(place, theirs)
        if format == "original" and config.vision != VisionConfig():
            _write_tower(model, new / tower_folder(config), config, dtype, unrun)
        summary = _write_tensors(model, new, config, theirs.text.vocab_size, naming, dtype, unrun)
        (new / "config.json").write_text(json.dumps(data, indent=2) + "\n")  # last, see ``new_folder``
        return summary


def _write_tensors(
    model: pathlib.Path,
    out: pathlib.Path,
    config: LlavaConfig,
    vocab_size: int,
    naming: Naming,
    dtype: str,
    unrun: dict[str, np.ndarray],
) -> ExportSummary:
    """Shards of whole arrays of ours; ``unrun`` goes with the last. An index is written if there are several."""
    shards = list(_shards(leaves(config, naming), np.dtype(DTYPES[dtype]).itemsize))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(tqdm(shards, unit="shard", disable=None), 1):
        tensors = _torch_tensors(model, config, shard, dtype)
        for leaf in shard:
            if leaf.path in ("embed.embedding", "head.kernel"):
                tensors |= {name: _grow(tensors[name], vocab_size) for name in leaf.names}
        if number == len(shards):
            tensors |= unrun
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(out / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(x.nbytes for x in tensors.values())
        del tensors  # frees them before the next shard is read
        storage.trim_memory()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return ExportSummary(dtype, len(weight_map), total)


def _shards(arrays: Iterable[Leaf], itemsize: int) -> Iterator[list[Leaf]]:
    """Groups of arrays of at most SHARD_BYTES; a larger array is a shard by itself."""
    shard: list[Leaf] = []
    size = 0
    for leaf in arrays:
        nbytes = math.prod(leaf.shape) * itemsize
        if shard and size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(leaf)
        size += nbytes
    yield shard


def _torch_tensors(model: pathlib.Path, config: LlavaConfig, arrays: list[Leaf], dtype: str) -> dict[str, np.ndarray]:
    targets = checkpoint.abstract_arrays(model, config, jax.devices("cpu")[0])
    wanted = {leaf.path: targets[leaf.path] for leaf in arrays}
    found = flatten_dict(checkpoint.restore(model, wanted, DTYPES[dtype]), sep=".")
    tensors: dict[str, np.ndarray] = {}
    for leaf in arrays:
        x = np.asarray(found.pop(leaf.path))
        parts = x if leaf.stacked else [x]
        tensors |= {
            name: np.ascontiguousarray(leaf.transform.to_torch(part))
            for name, part in zip(leaf.names, parts, strict=True)
        }
    return tensors


def _grow(x: np.ndarray, rows: int) -> np.ndarray:
    """(V, D) padded to ``rows`` rows with copies of row 0, the unknown token: never the most likely next token."""
    return np.concatenate([x, np.repeat(x[:1], rows - len(x), axis=0)])


def _unrun_tensors(model: pathlib.Path, config: LlavaConfig, naming: Naming, dtype: str) -> dict[str, np.ndarray]:
    """The unused tensors that a PyTorch model is built with. UserError if one is missing."""
    path = model / checkpoint.UNUSED
    tensors = storage.read_safetensors(path) if path.exists() else {}
    found = {naming.vision + name: x for name, x in tensors.items()}
    checkpoint.check_shapes(
        unrun_shapes(config, naming),
        {name: x.shape for name, x in found.items()},
        f"{path} does not contain the unused layers of the vision tower, which PyTorch expects; copy it from the "
        "converted checkpoint",
    )
    return {name: x.astype(DTYPES[dtype]) for name, x in found.items()}


def _write_tower(
    model: pathlib.Path, out: pathlib.Path, config: LlavaConfig, dtype: str, unrun: dict[str, np.ndarray]
) -> None:
    """A folder that transformers loads as a vision model; the original code reads the tower's config from it."""
    out.mkdir()
    tower = TOWERS["tower"]
    tensors = _torch_tensors(model, config, leaves(config, tower), dtype)
    prefix = NAMINGS["original"].vision
    tensors |= {tower.vision + name.removeprefix(prefix): x for name, x in unrun.items()}
    write_safetensors(out / "model.safetensors", tensors)
    data = {"architectures": [TOWER_CLASSES[config.crop_tower.kind]], "torch_dtype": dtype} | vision_to_hf(
        config.crop_tower
    )
    (out / "config.json").write_text(json.dumps(data, indent=2) + "\n")
    checkpoint.copy_files(model, out, ["preprocessor_config.json"])


def _complete_processor(folder: pathlib.Path, config: LlavaConfig) -> None:
    """Adds what transformers' processor needs and the original's files lack: padding, and "<image>"."""
    path = folder / "preprocessor_config.json"
    onevision = bool(config.tiling and config.tiling.max_tiles)
    name = "LlavaOnevision" if onevision else "LlavaNext" if config.tiling else "Llava"
    if config.tiling and path.exists():
        settings = read_json(path) | {
            "image_processor_type": f"{name}ImageProcessor",
            "image_grid_pinpoints": [list(point) for point in config.tiling.pinpoints],
        }
        path.write_text(json.dumps(settings, indent=2) + "\n")
    elif config.image_aspect == "pad" and path.exists():
        settings = read_json(path)
        settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        settings.setdefault("do_center_crop", config.vision.kind == "clip")
        path.write_text(json.dumps(settings, indent=2) + "\n")
    settings = {
        "processor_class": f"{name}Processor",
        "image_token": "<image>",
        "vision_feature_select_strategy": select_strategy(config),
        # What each processor counts an image's tokens by.
        **(
            {"num_image_tokens": config.image_tokens, "vision_aspect_ratio": f"anyres_max_{config.tiling.max_tiles}"}
            if config.tiling and config.tiling.max_tiles
            else {
                "num_additional_image_tokens": config.vision.class_tokens,
                "patch_size": config.vision.patch_size,
            }
        ),
    }
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if any(any(folder.glob(pattern)) for pattern in checkpoint.TOKENIZER):
        from transformers import AddedToken, AutoTokenizer

        with reading(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False))
        if tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id:
            tokenizer.save_pretrained(folder)
