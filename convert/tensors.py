"""A tensor of a PyTorch checkpoint that has not been read yet."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import ml_dtypes
import numpy as np

from pdrop_jax.checkpoint import storage
from pdrop_jax.convert.names import Shape

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
FLOATS = {name: np.dtype(dtype).name for name, dtype in storage.DTYPES.items()}  # of safetensors' names


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. ``dtype`` is a numpy name; ``read`` gives the array."""

    shape: Shape
    dtype: str
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]
