"""Where arrays lie on a mesh.

A mesh has three axes. ``data`` holds copies of the parameters, ``fsdp`` cuts them and brings a layer's together when
it runs, ``tensor`` cuts the heads, the mlp and the vocabulary and keeps them cut. The rows of a batch are cut over data
and fsdp. Axes are of type Auto: the compiler decides what is moved, ``constrain`` tells it where it would guess wrong.
With Explicit ones, where how an array is cut is part of its type, the model can be traced but is never run: a check.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pdrop_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
Logical = Sequence[str | None]  # a name of RULES for each dimension; None is never cut

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "model": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

_LAYER = r"(?:stages\.\d+|vision\.layers)\."
PARAMETERS: Mapping[str, Logical] = {
    r"embed\.embedding": ("vocab", "model"),
    r"head\.kernel": ("model", "vocab"),
    r"norm\.scale": (None,),
    r"newline\.embedding": (None,),
    r"projector\.linear_0\.kernel": ("model", "mlp"),
    r"projector\.linear_1\.kernel": ("mlp", "model"),
    r"projector\.linear_0\.bias": ("mlp",),
    r"projector\.linear_1\.bias": (None,),
    r"vision\.embed\.patch\.kernel": (None, None, None, "model"),
    r"vision\.embed\.position": (None, "model"),
    r"vision\.embed\.(?:class_token|patch\.bias|norm\.scale|norm\.bias)": (None,),
    _LAYER + r"attention\.[qkv]\.kernel": (None, "model", "heads", None),
    _LAYER + r"attention\.[qkv]\.bias": (None, "heads", None),
    _LAYER + r"attention\.o\.kernel": (None, "heads", None, "model"),
    _LAYER + r"mlp\.(?:gate|up)\.kernel": (None, "model", "mlp"),
    _LAYER + r"mlp\.(?:gate|up)\.bias": (None, "mlp"),
    _LAYER + r"mlp\.down\.kernel": (None, "mlp", "model"),
    _LAYER + r"(?:attention\.o|mlp\.down)\.bias": (None, None),
    _LAYER + r"(?:attention|mlp)_norm\.(?:scale|bias)": (None, None),
    _LAYER + r"lora\.attention\.[qkv]\.a": (None, "model", None),
    _LAYER + r"lora\.attention\.[qkv]\.b": (None, None, "heads", None),
    _LAYER + r"lora\.attention\.o\.a": (None, "heads", None, None),
    _LAYER + r"lora\.mlp\.(?:gate|up)\.a": (None, "model", None),
    _LAYER + r"lora\.mlp\.(?:gate|up)\.b": (None, None, "mlp"),
    _LAYER + r"lora\.mlp\.down\.a": (None, "mlp", None),
    _LAYER + r"lora\.(?:attention\.o|mlp\.down)\.b": (None, None, "model"),
    _LAYER + r"lora\..+\.scale": (None,),
}
_TREE = {"vision", "projector", "newline", "embed", "stages", "norm", "head"}  # first keys of the parameter tree


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices.

    Args:
      sizes: devices along each axis, 1 where it says nothing; None is all of them along fsdp.

    Raises:
      UserError: an unknown axis, a size below 1, or another number of devices than there are.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"fsdp": len(devices)} if sizes is None else sizes
    unknown = [name for name in sizes if name not in AXES]
    if unknown or any(size < 1 for size in sizes.values()):
        raise UserError(f"a mesh of {dict(sizes)}: give {', '.join(AXES)}, each at least 1")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        names = " * ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise UserError(f"the mesh takes {math.prod(shape)} devices ({names}), there are {len(devices)}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def logical_axes(name: str) -> Logical:
    """The row of ``PARAMETERS`` for a parameter's dotted name.

    Raises:
      ValueError: no row or more than one fits, or two dimensions of it are cut along the same mesh axis.
    """
    # Both arrays of a quantized kernel lie as the kernel does; the scales, of size 1 along inputs, are not cut there.
    name = re.sub(r"\.kernel\.(?:qvalue|scale)$", ".kernel", name)
    rows = [axes for pattern, axes in PARAMETERS.items() if re.fullmatch(pattern, name)]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of the sharding table fit {name}, expected one")
    used = [mesh_axis for axis in rows[0] if axis for mesh_axis in RULES[axis]]
    if len(set(used)) < len(used):
        raise ValueError(f"the sharding table cuts two dimensions of {name} along the same axis of {used}")
    return rows[0]


def partition(axes: Logical, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """``axes`` as mesh axes. A dimension that they do not divide is not cut: two key-value heads on four devices.

    Says it as the compiler does of its results, without axes of one device and without None at the end: a spec that is
    equal but says it otherwise makes ``jax.jit`` compile again.
    """

    def cut(axis: str | None, size: int) -> tuple[str, ...] | None:
        names = tuple(name for name in RULES[axis] if mesh.shape[name] > 1) if axis else ()
        return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None

    spec = [cut(axis, size) for axis, size in zip(axes, shape, strict=True)]
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of each array of a tree of parameters, or of one that holds such trees, as an optimizer's state.

    What is not part of a parameter tree is copied to every device, and so is a scalar.
    """

    def of(path: tuple, x: Any) -> NamedSharding:
        keys = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        begin = next((n for n, key in enumerate(keys) if key in _TREE), None)
        if begin is None or x.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition(logical_axes(".".join(keys[begin:])), x.shape, mesh))

    return jax.tree.map_with_path(of, tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """The shapes and dtypes of ``tree`` as ``jax.ShapeDtypeStruct``s that lie where ``shardings`` wants them."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings(tree, mesh)
    )


def place(params: Any, mesh: Mesh) -> Any:
    """``params`` where ``shardings`` wants them. What one device or the host holds is the same in all processes."""

    def put(x: Any, where: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(where, x.ndim):
            return x
        whole = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, whole.__getitem__)

    return jax.tree.map(put, params, shardings(params, mesh))


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """Of arrays whose first dimension is the rows of a batch; if so many cannot be cut, every device has all."""
    if rows is not None:
        return NamedSharding(mesh, partition(("batch",), (rows,), mesh))
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how ``x`` is cut, a name of ``RULES`` or None for each dimension; nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))


def explicit(shape: Sequence[int], *axes: str | None) -> PartitionSpec | None:
    """An operation's ``out_sharding``, for those whose operands do not settle it; None unless axes are Explicit."""
    mesh = jax.sharding.get_abstract_mesh()
    return partition(axes, shape, mesh) if mesh.are_all_axes_explicit else None


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **settings: Any) -> jax.Array:
    """``jax.lax.dot_general`` of a linear layer. With Explicit axes both must be cut alike along what is summed over.

    Raises:
      TypeError: they are not.
    """
    if jax.sharding.get_abstract_mesh().are_all_axes_explicit:
        cuts = [list(jax.typeof(y).sharding.spec) for y in (x, kernel)]
        ours, theirs = (
            [cut.pop(axis) for axis in axes[::-1]] for cut, axes in zip(cuts, dimension_numbers[0], strict=True)
        )
        if ours != theirs:
            raise TypeError(f"a sum over dimensions that are cut as {ours} and {theirs}")
        settings["out_sharding"] = PartitionSpec(*cuts[0], *cuts[1])
    return jax.lax.dot_general(x, kernel, dimension_numbers, **settings)


def constrain_params(tree: Any) -> Any:
    """Tells the compiler that ``tree`` lies where ``shardings`` wants it; nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))
