"""Quantization for inference: the decoder's kernels in 8 or 4 bits, and with w8a8, w4a8 and w4a4 their inputs too.

The weights of q, k, v, o, gate, up and down become integers, with a float32 scale for each output channel::

    kernel.qvalue    int8 or int4, the kernel's shape
    kernel.scale     float32, the kernel's shape but 1 along its inputs

Biases, norms, the embedding table, the head, the vision tower and the projector keep their dtype.

- int8 and int4 quantize weights alone. A matrix product reads integers from memory: on a TPU it multiplies by
  ``qvalue * scale``, rounded to the dtype of the activations, elsewhere by ``qvalue``, and scales the float32 sum.
- w8a8, w4a8 and w4a4 also quantize the input of a product, when it is computed, with a scale for each token that
  follows from its largest element. The product is one of integers, summed in int32. Devices along tensor, which have a
  part of the sum each, scale it first and add up numbers of the activations' dtype. w4a4 on a TPU multiplies int4;
  everything else widens int4 to int8 first. One product is simulated: XLA for GPUs cannot multiply a single row of
  int8 by int4, so that both become bfloat16, which is exact, and the sum is in float32.

An int4 takes half a byte on TPUs and GPUs, and a byte on CPUs, where 4 bits save nothing over 8. Kernels sharded along
fsdp are gathered in the dtype of the activations, so shard along tensor.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pdrop_jax.config import LlavaConfig, Quantization
from pdrop_jax.errors import UserError
from pdrop_jax.model.params import Params, path_name, spec_of
from pdrop_jax.sharding import constrain, platform, shards

# Bits of the weights, and of the activations, None where those are not quantized.
BITS: dict[str, tuple[int, int | None]] = {
    "int8": (8, None),
    "int4": (4, None),
    "w8a8": (8, 8),
    "w4a8": (4, 8),
    "w4a4": (4, 4),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class QuantizedKernel:
    """Integers and their scales in place of a kernel.

    Attributes:
      activations: static, bits that inputs are quantized to; None leaves them as they are.
    """

    qvalue: jax.Array
    scale: jax.Array
    activations: int | None = dataclasses.field(default=None, metadata={"static": True})


def check_quantization(quantize: str | None, cache: str | None = None) -> None:
    """Raises UserError for a quantization of weights and activations, or of caches, that is none of ours."""
    if quantize is not None and quantize not in BITS:
        raise UserError(f"a model cannot be quantized to {quantize!r}: choose one of {', '.join(BITS)}")
    if cache not in (None, "int8", "int4"):
        raise UserError(f"caches cannot be quantized to {cache!r}: choose int8 or int4")


def quantization_name(quantize: str | None, cache: str | None) -> str | None:
    """Both as a reader is told: "w8a8, int8 cache"; None if nothing is quantized."""
    return ", ".join(filter(None, [quantize, cache and f"{cache} cache"])) or None


def quantization_of(params: Params) -> str | None:
    """How a model's kernels are quantized, one of ``BITS``; None if they are not."""
    found = (x for x in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(x))
    bits = {(jnp.iinfo(x.qvalue.dtype).bits, x.activations) for x in found}
    return next((name for name, known in BITS.items() if known in bits), None)


def quantize_decoder(config: LlavaConfig, params: Params, quantization: Quantization = "int8") -> Params:
    """``params``, or a part of them, with the decoder's kernels quantized.

    Symmetric: with b bits an output channel's largest weight is 2^(b-1) - 1/2 steps, and no weight is moved by more
    than half a step.

    Args:
      params: stacked or not, of any float dtype; may be abstract, under ``jax.eval_shape``.

    Raises:
      UserError: qwix is not installed.
    """
    weights, activations = BITS[quantization]

    def quantize(path: tuple, x: jax.Array) -> jax.Array | QuantizedKernel:
        name = path_name(path)
        if not (name.startswith("stages.") and name.endswith(".kernel")):
            return x
        inputs = tuple(i - len(spec_of(config, name).shape) for i in spec_of(config, name).inputs)
        qvalue, scale = _quantize_weights(x, weights, inputs)
        return QuantizedKernel(qvalue, scale, activations)

    return jax.tree.map_with_path(quantize, params)


def quantize_along(x: jax.Array, bits: int, axes: Iterable[int]) -> tuple[jax.Array, jax.Array]:
    """``x`` as integers, and their float32 scales, of size 1 along ``axes``: each slice along them has a scale.

    Symmetric: the largest element of a slice is 2^(bits-1) - 1 steps. It must not lie halfway between two integers, as
    that of a weight does: two programs would round it differently, and a token's keys would depend on what computed it.

    Raises:
      UserError: qwix is not installed.
    """
    largest = 2 ** (bits - 1) - 1
    return _quantize(x, bits, axes, f"absmax,{(largest + 0.5) / largest}")


def _quantize(x: jax.Array, bits: int, axes: Iterable[int], calibration: str = "absmax") -> tuple[jax.Array, jax.Array]:
    try:
        import qwix  # needed for quantized models only
    except ImportError:
        raise UserError("quantization needs qwix, which is not installed: pip install 'pdrop-jax[quantize]'") from None
    apart = sorted(set(range(x.ndim)) - {axis % x.ndim for axis in axes})
    wide = x.astype(jnp.float32)
    found = qwix.quantize(wide, f"int{bits}", channelwise_axes=apart, calibration_method=calibration)
    return found.qvalue, found.scale


# Under jit, or the whole stack would be in memory as float32.
_quantize_weights = functools.partial(jax.jit, static_argnums=(1, 2))(_quantize)


def quantized_product(x: jax.Array, kernel: QuantizedKernel, inputs: int, summed: str | None = None) -> jax.Array:
    """``x @ (qvalue * scale)``: (..., *inputs) -> (..., *outputs), dtype of ``x``.

    Args:
      inputs: how many of the last dimensions of ``x`` are summed over.
      summed: logical axis of the first of them.
    """
    if kernel.activations is not None:
        return _integer_product(x, kernel, kernel.activations, inputs, summed)

    def scale_weights(x: jax.Array, qvalue: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.tensordot(x, (qvalue.astype(scale.dtype) * scale).astype(x.dtype), axes=inputs)

    def scale_product(x: jax.Array, qvalue: jax.Array, scale: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, qvalue.astype(x.dtype), axes=inputs, preferred_element_type=jnp.float32)
        return (y * scale.reshape(qvalue.shape[inputs:])).astype(x.dtype)

    # XLA for GPUs converts int8 weights inside a product but writes scaled ones to memory first. For TPUs it scales
    # inside, too, and then sums partial products over devices in the dtype of x.
    return jax.lax.platform_dependent(x, kernel.qvalue, kernel.scale, tpu=scale_weights, default=scale_product)


def _integer_product(x: jax.Array, kernel: QuantizedKernel, bits: int, inputs: int, summed: str | None) -> jax.Array:
    qx, x_scale = quantize_along(x, bits, range(-inputs, 0))
    leading = x.shape[:-inputs]
    # Devices along ``summed`` have a part of the sum each, a dimension of its own here: what they exchange is then
    # scaled and of the dtype of x, as that of any other product, instead of int32.
    parts = shards(summed, x.shape[-inputs]) if summed else 1
    qx = qx.reshape(*leading, parts, -1, *x.shape[1 - inputs :] if inputs > 1 else ())
    qvalue = kernel.qvalue.reshape(parts, -1, *kernel.qvalue.shape[1:])

    def product(qx: jax.Array, qvalue: jax.Array, dtype: DTypeLike = jnp.int32) -> jax.Array:
        """(parts, ..., *outputs)."""
        first = len(leading)
        sums = tuple(range(first + 1, first + 1 + inputs)), tuple(range(1, 1 + inputs))
        return jax.lax.dot_general(qx, qvalue, (sums, ((first,), (0,))), preferred_element_type=dtype)

    def as_they_are(qx: jax.Array, qvalue: jax.Array) -> jax.Array:
        return product(qx, qvalue) if qx.dtype == qvalue.dtype else in_bytes(qx, qvalue)

    def in_bytes(qx: jax.Array, qvalue: jax.Array) -> jax.Array:
        return product(qx.astype(jnp.int8), qvalue.astype(jnp.int8))

    def simulated(qx: jax.Array, qvalue: jax.Array) -> jax.Array:
        return product(qx.astype(jnp.bfloat16), qvalue.astype(jnp.bfloat16), jnp.float32).astype(jnp.int32)

    single = math.prod(leading) == 1 and kernel.qvalue.dtype == jnp.int4
    y = jax.lax.platform_dependent(
        qx, qvalue, tpu=as_they_are, cuda=simulated if single else in_bytes, default=in_bytes
    ).astype(jnp.float32)
    outputs = kernel.scale.shape[inputs:]
    y = (y * x_scale.reshape(*leading, *[1] * len(outputs)) * kernel.scale.reshape(outputs)).astype(x.dtype)
    if parts == 1:
        return y[0]
    y = constrain(y, summed, "batch", *[None] * (y.ndim - 2))
    return jax.lax.reduce(y, np.zeros((), y.dtype), jax.lax.add, (0,))  # jnp.sum would exchange float32


def is_quantized(x: object) -> TypeGuard[QuantizedKernel]:
    return isinstance(x, QuantizedKernel)


def stored_bytes(tree: Any) -> int:
    """Bytes that arrays, or abstract ones, take in this platform's memory, see the top of this module."""

    def bits(dtype: Any) -> int:
        return 4 if dtype == jnp.int4 and platform() != "cpu" else 8 * dtype.itemsize

    return sum(math.prod(x.shape) * bits(x.dtype) // 8 for x in jax.tree.leaves(tree))
