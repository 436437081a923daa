"""How an array of the model is declared, and the declarations of the blocks that several parts are made of."""

import dataclasses
import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pdrop_jax.config import Group
from pdrop_jax.sharding import RULES, Logical

Params = dict[str, Any]  # nested dict of arrays
Specs = dict[str, Any]  # nested dict of ParamSpec
EMBEDDING_STD = 0.02


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One array of the model.

    Attributes:
      shape: with the layers in front if it is a stack.
      axes: logical axis of each dimension, see ``sharding.RULES``.
      init: "normal" has standard deviation 1/sqrt(fan-in), "uniform" lies within +-1/sqrt(fan-in), "embedding" is
        normal with ``EMBEDDING_STD``.
      group: the part of the model that it is trained with.
      inputs: dimensions that the matrix product sums over; empty for an array that is not a matrix.
      decayed: whether weight decay applies.
      constant: never trained, whatever its group.

    Raises:
      ValueError: two dimensions would be sharded along the same mesh axis.
    """

    shape: tuple[int, ...]
    axes: Logical
    init: Literal["normal", "uniform", "embedding", "ones", "zeros"]
    group: Group
    inputs: tuple[int, ...] = ()
    decayed: bool = True
    constant: bool = False

    def __post_init__(self) -> None:
        used = [mesh_axis for axis in self.axes if axis for mesh_axis in RULES[axis]]
        if len(self.axes) != len(self.shape) or len(set(used)) < len(used):
            raise ValueError(f"axes {self.axes} do not fit an array of shape {self.shape}")

    @property
    def fan_in(self) -> int:
        return math.prod(self.shape[i] for i in self.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Dimensions of a matrix behind its inputs; stacked layers are neither."""
        return tuple(range(self.inputs[-1] + 1, len(self.shape)))

    def stacked(self, num_layers: int) -> "ParamSpec":
        return dataclasses.replace(
            self,
            shape=(num_layers, *self.shape),
            axes=(None, *self.axes),
            inputs=tuple(i + 1 for i in self.inputs),
        )

    def initial(self, name: str, seed: int, dtype: Any = jnp.float32) -> jax.Array:
        """``random`` by the dotted name of the array and a seed alone."""
        return self.random(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), dtype)

    def random(self, key: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """An initial value; drawn in float32, then cast to ``dtype``."""
        if self.init in ("ones", "zeros"):
            return (jnp.ones if self.init == "ones" else jnp.zeros)(self.shape, dtype)
        bound = EMBEDDING_STD if self.init == "embedding" else 1 / math.sqrt(self.fan_in)
        if self.init == "uniform":
            return jax.random.uniform(key, self.shape, jnp.float32, -bound, bound).astype(dtype)
        return (jax.random.normal(key, self.shape, jnp.float32) * bound).astype(dtype)


def linear_specs(
    shape: tuple[int, ...], axes: Logical, group: Group, *, inputs: tuple[int, ...] = (0,), bias: bool = False
) -> Specs:
    specs = {"kernel": ParamSpec(shape, axes, "normal", group, inputs)}
    if bias:
        first = len(inputs)
        whole = tuple(None if axis == "model" else axis for axis in axes[first:])
        specs["bias"] = ParamSpec(shape[first:], whole, "zeros", group, decayed=False)
    return specs


def norm_specs(D: int, group: Group, *, bias: bool = False, plus_one: bool = False) -> Specs:
    """``plus_one``: see ``layers.rms_norm``."""
    specs = {"scale": ParamSpec((D,), (None,), "zeros" if plus_one else "ones", group, decayed=False)}
    if bias:
        specs["bias"] = ParamSpec((D,), (None,), "zeros", group, decayed=False)
    return specs


def attention_specs(
    D: int, N: int, K: int, H: int, group: Group, *, qkv_bias: bool, output_bias: bool, heads: str | None = "heads"
) -> Specs:
    def project(count: int) -> Specs:
        return linear_specs((D, count, H), ("model", heads, None), group, bias=qkv_bias)

    output = linear_specs((N, H, D), (heads, None, "model"), group, inputs=(0, 1), bias=output_bias)
    return {"q": project(N), "k": project(K), "v": project(K), "o": output}
