"""Compares our logits with PyTorch's, on one fixed image and prompt."""

import math
import pathlib
from typing import Any

import jax
import numpy as np

from pdrop_jax import checkpoint
from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hf_config import hf_class, hf_config, namings_for
from pdrop_jax.convert.names import leaves, unrun_shapes
from pdrop_jax.convert.sources import Source
from pdrop_jax.convert.tensors import DTYPES
from pdrop_jax.errors import UserError
from pdrop_jax.families.gemma3.config import GemmaVisionConfig
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.families.qwen2_vl.inputs import lay_out
from pdrop_jax.inputs.anyres import count, pooled, tiled, whole
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.model.vlm import forward
from pdrop_jax.schedule import DropSchedule

TEXT_TOKENS = 12
SIZE = 100, 200  # height and width of a tiled picture, in pixels
GRID = 1, 12, 20  # frames, rows and columns of patches of a picture of any size


def compare(source: Source, model: pathlib.Path) -> tuple[float, float]:
    """The largest difference between the logits of ``source`` in PyTorch and of ``model`` here, and the largest logit.

    Both are dense and compute in the dtype of ``model``; they are in memory one after the other.

    Raises:
      UserError: torch is not installed, or transformers has no class for the model.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError("--check needs torch: pip install 'pdrop-jax[torch]'") from None
    config = LlavaConfig.load(model)
    dtype = checkpoint.abstract_arrays(model, config)["embed.embedding"].dtype.name
    row = fixed_row(config)
    theirs = torch_logits(source, config, row, dtype)
    ours = our_logits(model, row)
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())


def fixed_row(config: LlavaConfig) -> Row:
    """A prompt of ids spread over the vocabulary whose third token is an image of waves.

    If images are tiled it is twice as wide as high, and every tile shows all of it. A model for videos also gets a
    video of two frames near the end.
    """
    V = config.text.vocab_size
    ids = ((np.arange(TEXT_TOKENS) * 7919) % (V - 2)).tolist()  # never the last two
    if config.bos_token_id is not None:
        ids[0] = config.bos_token_id
    if isinstance(config.vision, QwenVisionConfig):
        return Row([*ids[:2], IMAGE_PLACEHOLDER, *ids[2:]], (lay_out(_waves(config.vision), GRID, config.vision),))
    size = config.vision.image_size
    t = np.linspace(0, 12, size, dtype=np.float32)
    picture = np.stack([np.sin(t[:, None] * a + t * b) for a, b in ((1, 0), (0, 1), (1, 1))], axis=-1)
    image = whole(picture, config)
    if config.tiling:
        crops, _ = count(SIZE, config)
        image = tiled(np.stack([picture * (n + 1) / crops for n in range(crops)]), SIZE, config)
    row = Row([*ids[:2], IMAGE_PLACEHOLDER, *ids[2:]], (image,))
    if config.video_token_id is None:
        return row
    video = pooled(np.stack([picture, picture[::-1]]), config)
    return Row([*row.ids[:-2], IMAGE_PLACEHOLDER, *row.ids[-2:]], (image, video))


def _waves(config: QwenVisionConfig) -> np.ndarray:
    """(n, F) float32, patches of a picture of ``GRID`` that all differ."""
    n = np.arange(math.prod(GRID), dtype=np.float32)[:, None]
    return np.sin(n * 0.7 + np.arange(config.patch_values, dtype=np.float32) * (n + 1) * 0.01)


def our_logits(model: pathlib.Path, row: Row) -> np.ndarray:
    """(S, V) float32 of the dense model."""
    config, params = checkpoint.load(model, schedule=DropSchedule.none())
    batch = assemble([row], config, choose_bucket([row], config))
    run = jax.jit(lambda params, batch: forward(config, params, batch, implementation="xla").logits)
    return np.asarray(run(params, batch)[0, : batch.length[0]])


def torch_logits(source: Source, config: LlavaConfig, row: Row, dtype: str) -> np.ndarray:
    """(S, V) float32 of transformers' model with the tensors of ``source``."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()

    # Any ids can stand for the image and the video, as long as they are not in the prompt.
    placeholders = [config.text.vocab_size - 1, config.text.vocab_size - 2]
    patches = isinstance(config.vision, QwenVisionConfig)
    names = ("image_token_id", "video_token_id") if patches else ("image_token_index", "video_token_index")
    data = hf_config(config, dtype) | dict(zip(names, placeholders, strict=True))
    _, architecture = hf_class(config)
    model = getattr(transformers, architecture).from_pretrained(
        None,
        config=transformers.AutoConfig.for_model(**data),
        state_dict=_torch_state(source, dtype),
        dtype=getattr(torch, dtype),
    )
    shown = iter([[placeholders[image.video]] * len(image) for image in row.images])
    ids = [n for i in row.ids for n in (next(shown) if i == IMAGE_PLACEHOLDER else [i])]
    inputs = {"input_ids": torch.tensor([ids])}
    if isinstance(config.vision, QwenVisionConfig):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == placeholders[0]).int()
        inputs["image_grid_thw"] = torch.tensor([GRID])
        inputs["pixel_values"] = torch.from_numpy(_waves(config.vision))
    for image in () if patches else row.images:
        pixels = torch.from_numpy(image.crops.transpose(0, 3, 1, 2).copy()).to(getattr(torch, dtype))
        if image.video:
            inputs["pixel_values_videos"] = pixels[None]
        else:
            inputs["pixel_values"] = pixels[None] if config.tiling else pixels
    if isinstance(config.vision, GemmaVisionConfig):
        inputs["token_type_ids"] = (inputs["input_ids"] == placeholders[0]).int()
    if config.tiling:
        inputs["image_sizes"] = torch.tensor([SIZE])
    with torch.no_grad():
        return model.eval()(**inputs).logits[0].float().numpy()


def _torch_state(source: Source, dtype: str) -> dict[str, Any]:
    """The tensors of ``source`` under transformers' names."""
    import torch

    config = source.config
    naming = namings_for(config)["hf"]
    theirs = [name for leaf in leaves(config, source.naming) for name in leaf.names]
    ours = [name for leaf in leaves(config, naming) for name in leaf.names]
    names = dict(zip(theirs, ours, strict=True))
    names |= dict(zip(unrun_shapes(config, source.naming), unrun_shapes(config, naming), strict=True))

    def tensor(x: np.ndarray) -> torch.Tensor:
        x = np.ascontiguousarray(x.astype(DTYPES[dtype]))
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if dtype == "bfloat16" else torch.from_numpy(x)

    return {names[name]: tensor(x.read()) for name, x in source.tensors.items()}
