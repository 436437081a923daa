"""A projector by itself: newly initialized, or from the file that LLaVA's pretraining writes."""

import functools
import math
import pathlib
import re

import numpy as np

from pdrop_jax import checkpoint
from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.files import open_safetensors
from pdrop_jax.convert.names import NAMINGS, Naming, Shape, projector_shapes
from pdrop_jax.convert.pickles import open_pickle
from pdrop_jax.convert.tensors import Tensor, Tensors

PREFIX = "model.mm_projector."
NAME = re.compile(r"(?:.*mm_projector\.)?((?:\d+\.)?(?:weight|bias))")


def projector_type(num_layers: int) -> str:
    """Its name in the original LLaVA code."""
    return "linear" if num_layers == 1 else f"mlp{num_layers}x_gelu"


def open_projector(path: pathlib.Path) -> Tensors:
    """The tensors of ``mm_projector.bin``, or a safetensors file of the same names, with or without their prefix.

    Raises:
      UserError: the file is missing or damaged, or a pickle that contains more than tensors.
    """
    tensors = open_safetensors(path) if path.suffix == ".safetensors" else open_pickle(path)
    names = {name: NAME.fullmatch(name) for name in tensors}
    return {PREFIX + found[1] if found else name: tensors[name] for name, found in names.items()}


def num_layers(projector: Tensors) -> int:
    """Number of layers of an opened projector; at least 1."""
    return max(sum(name.startswith(PREFIX) and name.endswith("weight") for name in projector), 1)


def read_projector(path: pathlib.Path, config: LlavaConfig, naming: Naming) -> Tensors:
    """The projector in file ``path``, under the names of ``naming``.

    Raises:
      UserError: it cannot be read, or does not fit ``config``; the differences are listed.
    """
    tensors = open_projector(path)
    linear = config.projector_layers == 1 and f"{PREFIX}weight" in tensors
    expected = projector_shapes(config, NAMINGS["original-linear" if linear else "original"])
    found = {name: x.shape for name, x in tensors.items()}
    checkpoint.check_shapes(expected, found, f"{path} does not contain the projector of this model")
    return {new: tensors[name] for name, new in zip(expected, projector_shapes(config, naming), strict=True)}


def fresh_projector(config: LlavaConfig, naming: Naming, seed: int) -> Tensors:
    """A projector as torch initialises nn.Linear: weights and biases uniform within 1/sqrt(fan-in)."""
    shapes = projector_shapes(config, naming)

    def draw(number: int, shape: Shape, bound: float) -> np.ndarray:
        rng = np.random.default_rng((seed % 2**64, number))  # one for each tensor: they may be read in any order
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        bound = 1 / math.sqrt(shapes[f"{name.rpartition('.')[0]}.weight"][1])
        tensors[name] = Tensor(shape, "float32", functools.partial(draw, number, shape, bound))
    return tensors
