"""int8 weights for inference: ``qwix.QArray``s in place of the decoder's kernels.

The weights of q, k, v, o, gate, up and down become int8, with a float32 scale for each output channel::

    kernel.qvalue    int8, the kernel's shape
    kernel.scale     float32, the kernel's shape but 1 along its inputs

Activations, biases, norms, the embedding table, the head, the vision tower and the projector keep their dtype. A layer
multiplies by ``qvalue * scale``, rounded to the dtype of its activations. On a TPU that happens inside the matrix
product: what is read from memory is int8. Kernels sharded along fsdp are gathered in the dtype of the activations, so
shard along tensor.
"""

import functools
from typing import TYPE_CHECKING, Any, TypeGuard

import jax
import jax.numpy as jnp

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.params import Params, path_name, spec_of

if TYPE_CHECKING:
    import qwix


def quantize_decoder(config: LlavaConfig, params: Params) -> Params:
    """``params``, or a part of them, with the decoder's kernels in int8.

    Symmetric: an output channel's largest weight is 127.5 steps, and no weight is moved by more than half a step.

    Args:
      params: stacked or not, of any float dtype; may be abstract, under ``jax.eval_shape``.

    Raises:
      UserError: qwix is not installed.
    """

    def quantize(path: tuple, x: jax.Array) -> "jax.Array | qwix.QArray":
        name = path_name(path)
        if not (name.startswith("stages.") and name.endswith(".kernel")):
            return x
        spec = spec_of(config, name)
        return _quantize(x, tuple(i - len(spec.shape) for i in spec.inputs))

    return jax.tree.map_with_path(quantize, params)


@functools.partial(jax.jit, static_argnums=1)  # else the whole stack would be in memory as float32
def _quantize(kernel: jax.Array, inputs: tuple[int, ...]) -> "qwix.QArray":
    try:
        import qwix  # needed with int8 weights only
    except ImportError:
        raise UserError("int8 weights need qwix, which is not installed: pip install 'pdrop-jax[quantize]'") from None
    outputs = set(range(kernel.ndim)) - {axis % kernel.ndim for axis in inputs}
    return qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=outputs)


def dequantize(kernel: "qwix.QArray", dtype: Any) -> jax.Array:
    import qwix

    return qwix.dequantize(kernel).astype(dtype)


def is_quantized(x: object) -> "TypeGuard[qwix.QArray]":
    return hasattr(x, "qvalue")
