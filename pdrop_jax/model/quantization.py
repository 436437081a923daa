"""int8 weights for inference: ``qwix.QArray``s in the places of the decoder's kernels.

The weights of q, k, v, o, gate, up and down become int8, with a float32 scale for each output channel::

    kernel.qvalue    int8, the kernel's shape
    kernel.scale     float32, the kernel's shape but 1 along its inputs

Everything else stays as it is: activations, biases, norms, the embedding table, the head, the vision tower and the
projector. A layer multiplies by ``qvalue * scale``, rounded to the dtype of its activations. On a TPU that happens
inside the matrix product: what is read from memory is int8. Kernels cut along fsdp are brought together in that dtype,
so cut along tensor.
"""

import functools
import re

import jax
import jax.numpy as jnp
import qwix

from pdrop_jax.model.layers import Params
from pdrop_jax.model.params import path_name

KERNEL = re.compile(r"stages\.\d+\.(?:\d+\.)?(?:attention|mlp)\.(\w+)\.kernel")
INPUTS = {  # projection -> the axes of its kernel that are summed over
    **dict.fromkeys(("q", "k", "v"), (-3,)),
    "o": (-3, -2),
    **dict.fromkeys(("gate", "up", "down"), (-2,)),
}


def quantize_decoder(params: Params) -> Params:
    """``params``, or a part of them, with the decoder's kernels in int8.

    Symmetric: an output channel's largest weight is 127.5 steps, and no weight is moved by more than half a step.

    Args:
      params: stacked or not, of any float dtype; may be abstract, under ``jax.eval_shape``.
    """

    def of(path: tuple, x: jax.Array) -> jax.Array | qwix.QArray:
        found = KERNEL.fullmatch(path_name(path))
        return _quantize(x, INPUTS[found[1]]) if found else x

    return jax.tree.map_with_path(of, params)


@functools.partial(jax.jit, static_argnums=1)  # else the whole stack would stand in memory as float32
def _quantize(kernel: jax.Array, inputs: tuple[int, ...]) -> qwix.QArray:
    outputs = set(range(kernel.ndim)) - {axis % kernel.ndim for axis in inputs}
    return qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=outputs)


def dequantize(layer: Params) -> Params:
    """One layer's parameters with plain kernels, in the dtype of its norms. Plain ones are passed on."""
    dtype = layer["attention_norm"]["scale"].dtype
    return jax.tree.map(
        lambda x: qwix.dequantize(x).astype(dtype) if is_quantized(x) else x, layer, is_leaf=is_quantized
    )


def is_quantized(x: object) -> bool:
    return isinstance(x, qwix.QArray)
