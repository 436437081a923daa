"""The decoder's weights in the layout that inference on a TPU reads.

A TPU stores an array in tiles of its layout's last two dimensions. A program whose loop wants another layout than its
argument has copies the argument in every call. Two changes give prefill and decode the same layout, the stored one:

- The kernels of q, k and v (L, D, N, H) are stored heads first, as (L, N, D, H).
- The mlp is padded with zeros to a multiple of ``LANES`` neurons per device. Without it the compiler would store gate
  and up with D last, which needs no padding, and copy them for decode. A padded neuron adds silu(0) * 0 = 0.

The order of an array's dimensions stays the same, so nothing else needs to know.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.params import Params, ParamSpec, spec_of
from pdrop_jax.sharding import devices_along, partition

LANES = 128  # last dimension of a tile
HEADS_FIRST = Layout((0, 2, 1, 3))  # of (L, D, N, H)


def tile(config: LlavaConfig, params: Params, mesh: Mesh | None = None) -> Params:
    """``params`` with the decoder's kernels as described above; kernels that are so already are not copied.

    Replaces the arrays in the dicts of ``params`` one after the other, so that the model is never in memory twice.

    Args:
      params: stacked, quantized or not.
      mesh: that of ``params``; None is one device.
    """
    return _replace_kernels(config, params, functools.partial(_tile, mesh=mesh))


def abstract_tiled(config: LlavaConfig, params: Params, mesh: Mesh) -> Params:
    """As ``tile``, for ``jax.ShapeDtypeStruct``s."""
    return _replace_kernels(config, params, functools.partial(_target, mesh=mesh))


def _replace_kernels(config: LlavaConfig, params: Params, new: Callable[[ParamSpec, Any], Any]) -> Params:
    for s, stack in params["stages"].items():
        for block in ("attention", "mlp"):
            for name, linear in stack[block].items():
                if "kernel" not in linear:
                    continue  # a norm of queries or keys
                spec = spec_of(config, f"stages.{s}.{block}.{name}.kernel")
                # A quantized kernel is two arrays. Its scales have size 1 along the inputs.
                linear["kernel"] = jax.tree.map(functools.partial(new, spec), linear["kernel"])
    return params


def _tile(spec: ParamSpec, x: Any, mesh: Mesh | None) -> jax.Array:
    target = _target(spec, x, mesh)
    if target.shape != x.shape:
        widths = tuple((0, new - old) for old, new in zip(x.shape, target.shape, strict=True))
        x = jax.jit(jnp.pad, static_argnums=1, out_shardings=target.sharding)(x, widths)
    if target.format.layout and x.format.layout.major_to_minor != target.format.layout.major_to_minor:
        x = jax.device_put(x, target.format)
    return jax.block_until_ready(x)  # else the untiled arrays would pile up


def _target(spec: ParamSpec, x: Any, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """Shape, dtype, sharding and layout of an array once tiled."""
    lanes = LANES * (1 if mesh is None else devices_along("mlp", mesh))
    shape = tuple(
        size + -size % lanes if axis == "mlp" and size > 1 else size
        for axis, size in zip(spec.axes, x.shape, strict=True)
    )
    sharding = x.sharding if mesh is None else NamedSharding(mesh, partition(spec.axes, shape, mesh))
    heads_first = len(spec.outputs) == 2 and shape[spec.inputs[0]] > 1 and 0 not in shape
    where = Format(HEADS_FIRST, sharding) if heads_first else sharding
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)
