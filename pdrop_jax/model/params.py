"""The parameters: every array of the model is declared here, once.

``param_specs`` is the tree of declarations. Abstract and random parameters, their shardings, LoRA adapters, int8
weights, weight decay, Muon's matrices and the trained groups all follow from it; only the PyTorch names are a second
table (``convert.names``). The tree::

    vision.embed.{patch, class_token, position, norm}, for SigLIP {patch, position}
    vision.layers.*        one stack (L, ...): the layers up to the selected hidden state
    projector.linear_{0, 1, ...}
    newline.embedding      (D,), if images are tiled
    embed.embedding        (V, D)
    stages.{0, 1, ...}.*   one stack (L_s, ...) for each stage of the drop schedule
    norm.scale
    head.kernel            (D, V), absent if tied to the embedding
"""

import dataclasses
import functools
import math
import re
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from pdrop_jax.config import Group, LlavaConfig, TextConfig, VisionConfig
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

    def random(self, key: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """An initial value; drawn in float32, then cast to ``dtype``."""
        if self.init in ("ones", "zeros"):
            return (jnp.ones if self.init == "ones" else jnp.zeros)(self.shape, dtype)
        bound = EMBEDDING_STD if self.init == "embedding" else 1 / math.sqrt(self.fan_in)
        if self.init == "uniform":
            return jax.random.uniform(key, self.shape, jnp.float32, -bound, bound).astype(dtype)
        return (jax.random.normal(key, self.shape, jnp.float32) * bound).astype(dtype)


def _linear(
    shape: tuple[int, ...], axes: Logical, group: Group, *, inputs: tuple[int, ...] = (0,), bias: bool = False
) -> Specs:
    specs = {"kernel": ParamSpec(shape, axes, "normal", group, inputs)}
    if bias:
        first = len(inputs)
        whole = tuple(None if axis == "model" else axis for axis in axes[first:])
        specs["bias"] = ParamSpec(shape[first:], whole, "zeros", group, decayed=False)
    return specs


def _norm(D: int, group: Group, *, bias: bool = False) -> Specs:
    specs = {"scale": ParamSpec((D,), (None,), "ones", group, decayed=False)}
    if bias:
        specs["bias"] = ParamSpec((D,), (None,), "zeros", group, decayed=False)
    return specs


def _attention(
    D: int, N: int, K: int, H: int, group: Group, *, qkv_bias: bool, output_bias: bool, heads: str | None = "heads"
) -> Specs:
    def project(count: int) -> Specs:
        return _linear((D, count, H), ("model", heads, None), group, bias=qkv_bias)

    output = _linear((N, H, D), (heads, None, "model"), group, inputs=(0, 1), bias=output_bias)
    return {"q": project(N), "k": project(K), "v": project(K), "o": output}


def decoder_layer_specs(config: TextConfig) -> Specs:
    D, N, K, H, F = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size
    return {
        "attention_norm": _norm(D, "llm"),
        "attention": _attention(D, N, K, H, "llm", qkv_bias=config.qkv_bias, output_bias=config.output_bias),
        "mlp_norm": _norm(D, "llm"),
        "mlp": {
            "gate": _linear((D, F), ("model", "mlp"), "llm"),
            "up": _linear((D, F), ("model", "mlp"), "llm"),
            "down": _linear((F, D), ("mlp", "model"), "llm"),
        },
    }


def vision_layer_specs(config: VisionConfig) -> Specs:
    D, N, H, F = config.hidden_size, config.num_heads, config.head_dim, config.intermediate_size
    return {
        "attention_norm": _norm(D, "vision", bias=True),
        "attention": _attention(D, N, N, H, "vision", heads=None, qkv_bias=True, output_bias=True),
        "mlp_norm": _norm(D, "vision", bias=True),
        "mlp": {
            "up": _linear((D, F), ("model", None), "vision", bias=True),
            "down": _linear((F, D), (None, "model"), "vision", bias=True),
        },
    }


def vision_embedding_specs(config: VisionConfig) -> Specs:
    D, P, clip = config.hidden_size, config.patch_size, config.kind == "clip"
    slots = config.class_tokens + config.num_patches
    specs = {
        "patch": _linear((P, P, 3, D), (None, None, None, "model"), "vision", inputs=(0, 1, 2), bias=not clip),
        "position": ParamSpec((slots, D), (None, "model"), "embedding", "vision"),
    }
    if clip:
        specs["class_token"] = ParamSpec((D,), (None,), "embedding", "vision")
        specs["norm"] = _norm(D, "vision", bias=True)
    return specs


def projector_specs(vision_size: int, D: int, num_layers: int) -> Specs:
    """Layers alternate between the two ways to shard a matrix, so that what one leaves sharded the next sums over."""

    def layer(n: int) -> Specs:
        axes = ("mlp", "model") if n % 2 else ("model", "mlp")
        return _linear((D if n else vision_size, D), axes, "projector", bias=True)

    return {f"linear_{n}": layer(n) for n in range(num_layers)}


@functools.cache
def param_specs(config: LlavaConfig) -> Specs:
    """The declaration of every array, as a nested dict. Not to be changed: it is made once for each config."""
    D, V = config.text.hidden_size, config.text.vocab_size

    def stack(layer: Specs, num_layers: int) -> Specs:
        return jax.tree.map(lambda spec: spec.stacked(num_layers), layer)

    ranges = config.schedule.layer_ranges(config.text.num_layers)
    decoder_layer = decoder_layer_specs(config.text)
    specs: Specs = {
        "vision": {
            "embed": vision_embedding_specs(config.vision),
            "layers": stack(vision_layer_specs(config.vision), config.vision_layers),
        },
        "projector": projector_specs(config.vision.hidden_size, D, config.projector_layers),
        "embed": {"embedding": ParamSpec((V, D), ("vocab", "model"), "embedding", "llm")},
        "stages": {str(s): stack(decoder_layer, stop - start) for s, (start, stop) in enumerate(ranges)},
        "norm": _norm(D, "llm"),
    }
    if config.tiling:
        specs["newline"] = {"embedding": ParamSpec((D,), (None,), "embedding", "llm")}
    if not config.text.tie_embeddings:
        specs["head"] = _linear((D, V), ("model", "vocab"), "llm")
    return specs


def lora_specs(kernel: ParamSpec, rank: int) -> Specs:
    """The adapter of a matrix: what is added to its product is ``scale * ((x @ a) @ b)``, see ``lora``."""
    first = kernel.inputs[0]
    stack, ins, outs = (slice(first), slice(first, kernel.inputs[-1] + 1), slice(kernel.inputs[-1] + 1, None))
    shape, axes = kernel.shape, tuple(kernel.axes)
    a = ParamSpec(
        (*shape[stack], *shape[ins], rank), (*axes[stack], *axes[ins], None), "uniform", "lora", kernel.inputs
    )
    b = ParamSpec((*shape[stack], rank, *shape[outs]), (*axes[stack], None, *axes[outs]), "zeros", "lora")
    return {"a": a, "b": b, "scale": ParamSpec(shape[stack], axes[stack], "ones", "lora", decayed=False, constant=True)}


@functools.cache
def _by_name(config: LlavaConfig) -> dict[str, ParamSpec]:
    return flatten_dict(param_specs(config), sep=".")


def spec_of(config: LlavaConfig, name: str) -> ParamSpec:
    """The declaration of a parameter by its dotted name; for one of a stage, that of its stack in the first stage.

    Adapters and the parts of a quantized kernel are derived from their kernel. A list of layers counts as a stack.

    Raises:
      KeyError: the model has no such parameter.
    """
    # A quantized kernel and its scales are laid out as the kernel is; scales have size 1 along the inputs.
    name = re.sub(r"\.kernel\.(?:qvalue|scale)$", ".kernel", name)
    name = re.sub(r"^stages\.\d+\.(?:\d+\.)?", "stages.0.", re.sub(r"^vision\.layers\.\d+\.", "vision.layers.", name))
    base, lora, part = name.partition(".lora.")
    if lora:
        return lora_specs(_by_name(config)[f"{base}.kernel"], 1)[part]
    return _by_name(config)[name]


def path_name(path: tuple) -> str:
    """A key path as dotted text: ``stages.0.mlp.up.kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def abstract_params(config: LlavaConfig, dtype: Any = jnp.float32) -> Params:
    """The parameter tree of ``config`` with a ``jax.ShapeDtypeStruct`` for each array."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), param_specs(config))


def init_params(config: LlavaConfig, seed: int = 0, dtype: Any = jnp.float32) -> Params:
    """Random parameters, see ``ParamSpec.init``. The value of an array depends on its name and ``seed`` alone."""

    def init(path: tuple, spec: ParamSpec) -> jax.Array:
        return spec.random(jax.random.fold_in(jax.random.key(seed), zlib.crc32(path_name(path).encode())), dtype)

    return jax.tree.map_with_path(init, param_specs(config))


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
