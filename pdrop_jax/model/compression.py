"""The arrays of early compression (LLaVA-UHD v4): their shapes, and how each begins as one of the layer in front.

``compressor`` is the module itself. W1 is block-diagonal with layer k's first matrix four times, W2 is a quarter of its
second one four times one above the other: the MLP of four patches begins as the mean of layer k's own over them, as far
as LN2 over the joined patches is LN2 over each. Biases, LN1 and attention are layer k's, LN2 is its own four times. The
zeros beside the blocks are trained like the rest, as in the authors' code.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pdrop_jax.config import EarlyCompression, LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.specs import Params, ParamSpec, Specs, linear_specs, norm_specs
from pdrop_jax.vision_config import WINDOW

PATCHES = WINDOW**2  # of a window
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How an array of the module is made of one of layer k: its shape, the way back, and its values."""

    shape: Callable[[Shape], Shape]
    inverse: Callable[[Shape], Shape]
    values: Callable[[np.ndarray], np.ndarray]


def _rows(count: int) -> tuple[Callable[[Shape], Shape], Callable[[Shape], Shape]]:
    """The first dimension ``count`` times, and back."""
    return lambda shape: (shape[0] * count, *shape[1:]), lambda shape: (shape[0] // count, *shape[1:])


def _blocks(x: np.ndarray) -> np.ndarray:
    return np.kron(np.eye(PATCHES, dtype=x.dtype), x)


def averaging(count: int) -> Expansion:
    """A matrix that does to ``count`` joined vectors what the layer's does to their mean."""
    return Expansion(*_rows(count), lambda x: np.concatenate([x / count] * count).astype(x.dtype))


COPIED = Expansion(lambda shape: shape, lambda shape: shape, lambda x: x)
TILED = Expansion(*_rows(PATCHES), lambda x: np.concatenate([x] * PATCHES))
BLOCK_DIAGONAL = Expansion(
    lambda shape: (shape[0] * PATCHES, shape[1] * PATCHES),
    lambda shape: (shape[0] // PATCHES, shape[1] // PATCHES),
    _blocks,
)


def expansion(name: str) -> Expansion:
    """That of an array by its name within a layer, such as ``mlp.up.kernel``."""
    block, _, rest = name.partition(".")
    if block == "mlp_norm" or rest in ("up.bias", "gate.bias"):
        return TILED
    if rest in ("up.kernel", "gate.kernel"):
        return BLOCK_DIAGONAL
    return averaging(PATCHES) if (block, rest) == ("mlp", "down.kernel") else COPIED


def compressor_specs(compression: EarlyCompression, layer: Specs, D: int) -> Specs:
    """The arrays of the module, from those of a layer of the tower; "average" has none."""
    if compression.kind == "average":
        return {}
    if compression.kind == "unshuffle":
        return {
            "norm": norm_specs(PATCHES * D, "compressor", bias=True),
            "linear_0": linear_specs((PATCHES * D, PATCHES * D), ("model", None), "compressor", bias=True),
            "linear_1": linear_specs((PATCHES * D, D), (None, "model"), "compressor", bias=True),
        }

    def expanded(name: str, spec: ParamSpec) -> ParamSpec:
        return dataclasses.replace(spec, shape=expansion(name).shape(spec.shape), group="compressor")

    specs = {name: expanded(name, spec) for name, spec in flatten_dict(layer, sep=".").items()}
    return unflatten_dict(specs, sep=".")


def with_compression(
    config: LlavaConfig, compression: EarlyCompression | None, merge_size: int | None = None
) -> LlavaConfig:
    """``config`` with the module in its tower, and with squares of ``merge_size`` features a side joined behind it.

    Args:
      compression: None leaves the tower as it is.
      merge_size: of a CLIP or SigLIP tower; None is 2 behind a compressed tower, so that 16 patches become one token,
        as in LLaVA-UHD v4. A Qwen tower keeps the merger that it has.

    Raises:
      UserError: the tower has no such layer, an odd grid or is of another family; see ``VisionConfig``.
    """
    if config.family != "LLaVA" and merge_size is not None:
        raise UserError(f"a {config.family} model has a merger of its own: leave out --merge-size")
    changes: dict[str, Any] = {} if compression is None else {"early_compression": compression}
    if config.family == "LLaVA" and (changes or merge_size):
        changes["merge_size"] = merge_size or WINDOW
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


def is_compressed(config: LlavaConfig) -> bool:
    """Whether the model compresses, merges or slices as LLaVA-UHD v4 does: no other library can load it."""
    merges = config.family == "LLaVA" and config.crop_tower.merge_size > 1
    slices = config.tiling is not None and config.tiling.choice == "aspect"
    return config.vision.early_compression is not None or merges or slices


def compressed_params(config: LlavaConfig, params: Params, seed: int = 0) -> Params:
    """Parameters of the compressed ``config``, whose values come from those of the same model without compression.

    Args:
      params: numpy or jax arrays, with the tower's layers as one stack.
      seed: RNG seed of the weights of an "unshuffle" module, which are random.
    """
    vision, compression = dict(params["vision"]), config.vision.early_compression
    if compression:
        first, stack = compression.after + 1, jax.tree.map(np.asarray, vision["layers"])
        vision["layers"] = jax.tree.map(lambda x: x[:first], stack)
        vision["later_layers"] = jax.tree.map(lambda x: x[first:], stack)
        layer = jax.tree.map(lambda x: x[first - 1], flatten_dict(stack, sep="."))
        if compression.kind == "window":
            vision["compressor"] = unflatten_dict(
                {name: expansion(name).values(x) for name, x in layer.items()}, sep="."
            )
        elif specs := compressor_specs(compression, {}, config.vision.hidden_size):
            dtype = layer["mlp.up.kernel"].dtype
            drawn = {
                name: spec.initial(f"vision.compressor.{name}", seed, dtype)
                for name, spec in flatten_dict(specs, sep=".").items()
            }
            vision["compressor"] = unflatten_dict(drawn, sep=".")
    projector = dict(params["projector"])
    if config.family == "LLaVA" and (count := config.crop_tower.merge_size**2) > 1:
        first_layer = projector["linear_0"]
        projector["linear_0"] = first_layer | {"kernel": averaging(count).values(np.asarray(first_layer["kernel"]))}
    return {**params, "vision": vision, "projector": projector}
