"""int8 weights for inference: ``qwix.QArray``s in place of the decoder's kernels.

The weights of q, k, v, o, gate, up and down become int8, with a float32 scale for each output channel::

    kernel.qvalue    int8, the kernel's shape
    kernel.scale     float32, the kernel's shape but 1 along its inputs

Activations, biases, norms, the embedding table, the head, the vision tower and the projector keep their dtype. What a
matrix product reads from memory is int8: on a TPU it multiplies by ``qvalue * scale``, rounded to the dtype of the
activations, elsewhere by ``qvalue``, and the sum is scaled in float32. Kernels sharded along fsdp are gathered in the
dtype of the activations, so shard along tensor.
"""

import functools
from typing import TYPE_CHECKING, TypeGuard

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


def quantized_product(x: jax.Array, kernel: "qwix.QArray", inputs: int) -> jax.Array:
    """``x @ (qvalue * scale)``: (..., *inputs) -> (..., *outputs), dtype of ``x``.

    Args:
      inputs: how many of the last dimensions of ``x`` are summed over.
    """

    def scale_weights(x: jax.Array, qvalue: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.tensordot(x, (qvalue * scale).astype(x.dtype), axes=inputs)

    def scale_product(x: jax.Array, qvalue: jax.Array, scale: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, qvalue.astype(x.dtype), axes=inputs, preferred_element_type=jnp.float32)
        return (y * scale.reshape(qvalue.shape[inputs:])).astype(x.dtype)

    # XLA for GPUs converts int8 weights inside a product but writes scaled ones to memory first. For TPUs it scales
    # inside, too, and then sums partial products over devices in the dtype of x.
    return jax.lax.platform_dependent(x, kernel.qvalue, kernel.scale, tpu=scale_weights, default=scale_product)


def is_quantized(x: object) -> "TypeGuard[qwix.QArray]":
    return hasattr(x, "qvalue")
