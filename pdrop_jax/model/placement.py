"""Where parameters lie on a mesh: their logical axes (``params``) under the rules of ``sharding``."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.params import param_specs, path_name, spec_of
from pdrop_jax.sharding import partition


def shardings(config: LlavaConfig, tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of each array of a parameter tree, or of a tree that holds such trees, like an optimizer's state.

    Arrays outside of parameter trees are replicated, and so are scalars.

    Args:
      config: the model's; its schedule need not be that of ``tree``.
    """
    roots = param_specs(config).keys()

    def sharding_of(path: tuple, x: Any) -> NamedSharding:
        keys = path_name(path).split(".")
        first = next((n for n, key in enumerate(keys) if key in roots), None)
        if first is None or x.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        spec = spec_of(config, ".".join(keys[first:]))
        return NamedSharding(mesh, partition(spec.axes, x.shape, mesh))

    return jax.tree.map_with_path(sharding_of, tree)


def abstract(config: LlavaConfig, tree: Any, mesh: Mesh) -> Any:
    """The shapes and dtypes of ``tree`` as ``jax.ShapeDtypeStruct``s with the shardings of ``shardings``."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings(config, tree, mesh),
    )


def place(config: LlavaConfig, params: Any, mesh: Mesh) -> Any:
    """``params`` on the devices of ``mesh``. Arrays of one device or of the host must be equal in all processes."""

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        whole = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, whole.__getitem__)

    return jax.tree.map(put, params, shardings(config, params, mesh))


def constrain_params(config: LlavaConfig, tree: Any) -> Any:
    """Tells the compiler that ``tree`` has the shardings of ``shardings``; nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, shardings(config, tree, mesh))
