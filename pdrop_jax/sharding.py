"""The mesh, and the rules that assign an array's logical axes to it.

A mesh has three axes. ``data`` holds copies of the parameters; ``fsdp`` shards them and gathers a layer's when it runs;
``tensor`` shards the heads, the mlp and the vocabulary and keeps them sharded. The rows of a batch are sharded over
data and fsdp. The crops in the vision tower are sharded over all three, and so are whole rows between the products of a
layer, if there are enough. Axes are of type Auto: the compiler decides what is communicated, and ``constrain`` tells it
where it would guess wrong.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pdrop_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
SUBLANES = 8  # slots of a TPU register, half a tile of bfloat16 in memory (model.cache.TILE)
Logical = tuple[str | None, ...]  # a name of RULES for each dimension; None is never sharded

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "copies": ("data",),  # of the parameters: the rows of all devices that share one
    "rows": ("data", "fsdp", "tensor"),  # of a batch, or its crops, each whole
    "sequence": ("tensor",),
    "model": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices.

    Args:
      sizes: devices along each axis, 1 for those left out; None puts all of them along fsdp.
      devices: None is ``jax.devices()``.

    Raises:
      UserError: an unknown axis, a size below 1, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"fsdp": len(devices)} if sizes is None else sizes
    unknown = [name for name in sizes if name not in AXES]
    if unknown or any(size < 1 for size in sizes.values()):
        raise UserError(f"invalid mesh {dict(sizes)}: the axes are {', '.join(AXES)}, each with a size of at least 1")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        names = " * ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise UserError(f"the mesh needs {math.prod(shape)} devices ({names}), but there are {len(devices)}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def platform() -> str:
    """Platform that a program is traced for, "cpu", "gpu" or "tpu": the mesh's, which need not be at hand, if any."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def partition(axes: Logical, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Logical axes as a spec of mesh axes. A dimension that they do not divide is sharded over the first of them that
    do, or replicated, such as two key-value heads on four devices.

    Mesh axes of size 1 and trailing Nones are left out, as the compiler leaves them out of the shardings of its
    results: an equivalent spec that is written differently makes ``jax.jit`` compile again.
    """

    def mesh_axes(axis: str | None, size: int) -> tuple[str, ...] | None:
        names = tuple(name for name in RULES[axis] if mesh.shape[name] > 1) if axis else ()
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        return names or None

    spec = [mesh_axes(axis, size) for axis, size in zip(axes, shape, strict=True)]
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """The sharding of arrays whose first dimension is the rows of a batch.

    Args:
      rows: replicates the rows if the mesh does not divide them; None shards them in any case.
    """
    if rows is not None:
        return NamedSharding(mesh, partition(("batch",), (rows,), mesh))
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def devices_along(axis: str, mesh: Mesh | AbstractMesh) -> int:
    """Devices that a logical axis is sharded over where they divide it."""
    return math.prod(mesh.shape[name] for name in RULES[axis])


def shards(axis: str, size: int) -> int:
    """How many pieces a dimension of ``size`` with a logical axis is cut into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return size // NamedSharding(mesh, partition((axis,), (size,), mesh)).shard_shape((size,))[0]


def padding_for(axis: str, size: int) -> int:
    """How many elements to add so that more devices share a dimension of ``size``: 6 to ten crops on eight devices.

    0 without a mesh, or if each device would compute as many as before.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 0
    padding = -size % devices_along(axis, mesh)
    return padding if (size + padding) // devices_along(axis, mesh) < size // shards(axis, size) else 0


def constrain_hidden(x: jax.Array) -> jax.Array:
    """Tells the compiler the sharding of hidden states (B, T, D) between the products of a layer.

    Every token is on its own there. Each device has whole rows if there are enough: a drop moves tokens within them,
    and XLA for TPUs adds up products by a reduce-scatter only if each device gets a multiple of ``SUBLANES`` slots,
    which behind a drop it seldom does of every row. Fewer rows are cut by slots if that gives such multiples, and
    otherwise each into as many parts as there are devices for it, which spares relayouts. The compiler can express that
    only if rows divide the devices along tensor. A single token, as in decoding, is not cut along tensor.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    B, T, D = x.shape
    batch, tensor = devices_along("batch", mesh), mesh.shape["tensor"]
    rows, left = divmod(B, batch)  # rows for all the devices along tensor
    if T > 1 and rows > 1 and not left:
        if rows % tensor == 0:
            return constrain(x, "rows", None, None)
        if tensor % rows == 0 and T % (tensor // rows) == 0 and T % (SUBLANES * tensor):
            return constrain(x.reshape(B * T, D), "rows", None).reshape(x.shape)
    return constrain(x, "batch", "sequence", None)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler the sharding of ``x`` by a logical axis for each dimension; does nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))
