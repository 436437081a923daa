"""The parameters: every array of the model is declared here, once.

``param_specs`` is the tree of declarations. Abstract and random parameters, their shardings, LoRA adapters, int8
weights, weight decay, Muon's matrices and the trained groups all follow from it; only the PyTorch names are a second
table (``convert.names``). The tree::

    vision.embed.{patch, class_token, position, norm}, for SigLIP {patch, position}
    vision.layers.*        one stack (L, ...): the layers up to the selected hidden state
    vision.{compressor, later_layers}.*    with early compression, which ``layers`` ends in front of: its module, and
                           the layers behind it as another stack
    projector.linear_{0, 1, ...}
    newline.embedding      (D,), if images are tiled
    standby.{tokens, mlps, temporal, projector}, if the tower has standby tokens
    embed.embedding        (V, D)
    stages.{0, 1, ...}.*   one stack (L_s, ...) for each stage of the drop schedule
    norm.scale
    head.kernel            (D, V), absent if tied to the embedding
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.families.gemma3 import params as gemma3
from pdrop_jax.families.internvl import params as internvl
from pdrop_jax.families.qwen2_vl import params as qwen2_vl
from pdrop_jax.families.smolvlm import params as smolvlm
from pdrop_jax.model.compression import compressor_specs
from pdrop_jax.model.specs import Params as Params
from pdrop_jax.model.specs import ParamSpec as ParamSpec
from pdrop_jax.model.specs import Specs, attention_specs, linear_specs, norm_specs
from pdrop_jax.model.standby_specs import copied_from, standby_specs
from pdrop_jax.model.vision_specs import crop_tower_specs

# LlavaConfig.family -> the declarations of its tower and projector, in place of ``crop_tower_specs``.
FAMILIES: dict[str, Callable[[LlavaConfig], Specs]] = {
    "gemma3": gemma3.specs,
    "internvl": internvl.specs,
    **dict.fromkeys(("smolvlm", "idefics3"), smolvlm.specs),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), qwen2_vl.specs),
}


def decoder_layer_specs(config: TextConfig) -> Specs:
    D, N, K, H, F = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size
    plus_one = config.norm_plus_one
    norms = ["attention_norm", "mlp_norm", *(["attention_post_norm", "mlp_post_norm"] if config.post_norms else [])]
    attention = attention_specs(D, N, K, H, "llm", qkv_bias=config.qkv_bias, output_bias=config.output_bias)
    if config.qk_norm:
        attention |= {name: norm_specs(H, "llm", plus_one=plus_one) for name in ("q_norm", "k_norm")}
    return {
        **{name: norm_specs(D, "llm", plus_one=plus_one) for name in norms},
        "attention": attention,
        "mlp": {
            "gate": linear_specs((D, F), ("model", "mlp"), "llm"),
            "up": linear_specs((D, F), ("model", "mlp"), "llm"),
            "down": linear_specs((F, D), ("mlp", "model"), "llm"),
        },
    }


@functools.cache
def param_specs(config: LlavaConfig) -> Specs:
    """The declaration of every array, as a nested dict. Not to be changed: it is made once for each config."""
    D, V = config.text.hidden_size, config.text.vocab_size

    def stack(layer: Specs, num_layers: int) -> Specs:
        return jax.tree.map(lambda spec: spec.stacked(num_layers), layer)

    ranges = config.schedule.layer_ranges(config.text.num_layers)
    decoder_layer = decoder_layer_specs(config.text)
    tower = FAMILIES.get(config.family, crop_tower_specs)(config)
    vision = dict(tower["vision"])
    embed, layer, depth = vision.pop("embed"), vision.pop("layer"), config.vision_layers
    if compression := config.vision.early_compression:
        first = compression.after + 1
        vision |= {"later_layers": stack(layer, depth - first)}
        if module := compressor_specs(compression, layer, config.vision.hidden_size):
            vision["compressor"] = module
        depth = first
    specs: Specs = {
        "vision": {"embed": embed, "layers": stack(layer, depth), **vision},
        "projector": tower["projector"],
        "embed": {"embedding": ParamSpec((V, D), ("vocab", "model"), "embedding", "llm")},
        "stages": {str(s): stack(decoder_layer, stop - start) for s, (start, stop) in enumerate(ranges)},
        "norm": norm_specs(D, "llm", plus_one=config.text.norm_plus_one),
    }
    if config.standby:
        specs["standby"] = standby_specs(config)
    if config.tiling:
        specs["newline"] = {"embedding": ParamSpec((D,), (None,), "embedding", "llm")}
    if not config.text.tie_embeddings:
        specs["head"] = linear_specs((D, V), ("model", "vocab"), "llm")
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
    name = re.sub(r"^vision\.(layers|later_layers)\.\d+\.", r"vision.\1.", name)
    name = re.sub(r"^stages\.\d+\.(?:\d+\.)?", "stages.0.", name)
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
    return jax.tree.map_with_path(lambda path, spec: spec.initial(path_name(path), seed, dtype), param_specs(config))


def init_array(config: LlavaConfig, name: str, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """One array of ``init_params``, by its dotted name."""
    return _by_name(config)[name].initial(name, seed, dtype)


def add_standby(config: LlavaConfig, params: Params, seed: int = 0) -> Params:
    """``params``, in stacks and without standby tokens, with those of ``config``, see ``standby_specs.copied_from``."""
    known = flatten_dict(params, sep=".")
    dtype = known["embed.embedding"].dtype

    def begin(path: tuple, spec: ParamSpec) -> jax.Array:
        name = f"standby.{path_name(path)}"
        source = copied_from(name)
        return init_array(config, name, seed, dtype) if source is None else known[source]

    return {**params, "standby": jax.tree.map_with_path(begin, param_specs(config)["standby"])}


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
