"""Compares our logits with PyTorch's, on one fixed image and prompt."""

import pathlib
from typing import Any

import jax
import numpy as np

from pdrop_jax import checkpoint
from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hf_config import FAMILIES, hf_class, hf_config, namings_for
from pdrop_jax.convert.names import leaves, unrun_shapes
from pdrop_jax.convert.sources import Source
from pdrop_jax.convert.tensors import DTYPES
from pdrop_jax.convert.waves import one_crop, waves
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import count, pooled, tiled
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.model.vlm import forward
from pdrop_jax.schedule import DropSchedule

TEXT_TOKENS = 12
SIZE = 100, 200  # height and width of a tiled picture, in pixels


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
    if family := FAMILIES.get(config.family):
        return Row([*ids[:2], IMAGE_PLACEHOLDER, *ids[2:]], (family.fixed_image(config),))
    picture, image = waves(config.crop_tower.image_size), one_crop(config)
    if config.tiling:
        crops, _ = count(SIZE, config)
        image = tiled(np.stack([picture * (n + 1) / crops for n in range(crops)]), SIZE, config)
    row = Row([*ids[:2], IMAGE_PLACEHOLDER, *ids[2:]], (image,))
    if config.video_token_id is None:
        return row
    video = pooled(np.stack([picture, picture[::-1]]), config)
    return Row([*row.ids[:-2], IMAGE_PLACEHOLDER, *row.ids[-2:]], (image, video))


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
    family, data = FAMILIES.get(config.family), hf_config(config, dtype)
    for key, value in zip(("image_token", "video_token"), placeholders, strict=True):
        data[f"{key}_id" if f"{key}_id" in data else f"{key}_index"] = value
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
    if family:
        is_image = np.array([ids]) == placeholders[0]
        found = family.torch_inputs(config, row.images[0], is_image.astype(np.int32))
        inputs |= {key: torch.from_numpy(x) for key, x in found.items()}
    for image in () if family else row.images:
        pixels = torch.from_numpy(image.crops.transpose(0, 3, 1, 2).copy()).to(getattr(torch, dtype))
        if image.video:
            inputs["pixel_values_videos"] = pixels[None]
        else:
            inputs["pixel_values"] = pixels[None] if config.tiling else pixels
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
