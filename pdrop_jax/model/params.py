"""The parameter tree: its shapes, random values, and its stage boundaries.

The tree is a nested dict::

    vision.embed.{patch, class_token, position, norm}, of SigLIP {patch, position}
    vision.layers.*        one stack (L, ...): the layers that run, up to the selected hidden state
    projector.linear_{0, 1}
    newline.embedding      (D,), where pictures are tiled
    embed.embedding        (V, D)
    stages.{0, 1, ...}.*   one stack (L_s, ...) for each stage of the drop schedule
    norm.scale
    head.kernel            (D, V), absent if tied to the embedding

Stacks are scanned. On a CPU the scan copies each layer's weights out of the stack before it multiplies, so there
``unstack`` turns every stack into a list of layers, and the model runs that as a plain loop.
"""

import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model import layers
from pdrop_jax.model.layers import Params
from pdrop_jax.schedule import DropSchedule


def abstract_params(config: LlavaConfig, dtype: Any = jnp.float32) -> Params:
    """The parameter tree of ``config`` with a ``jax.ShapeDtypeStruct`` for each array."""
    D, V = config.text.hidden_size, config.text.vocab_size
    leaf = jax.ShapeDtypeStruct
    decoder_layer = layers.declare(layers.DecoderLayer, config.text)
    projector_sizes = (config.vision.hidden_size, D, config.projector_layers)
    ranges = config.schedule.layer_ranges(config.text.num_layers)
    tree = {
        "vision": {
            "embed": layers.declare(layers.VisionEmbedding, config.vision),
            "layers": _stack_shapes(layers.declare(layers.VisionLayer, config.vision), config.vision_layers),
        },
        "projector": layers.declare(layers.Projector, *projector_sizes),
        "embed": {"embedding": leaf((V, D), jnp.float32)},
        "stages": {str(s): _stack_shapes(decoder_layer, stop - start) for s, (start, stop) in enumerate(ranges)},
        "norm": {"scale": leaf((D,), jnp.float32)},
    }
    if config.tiling:
        tree["newline"] = {"embedding": leaf((D,), jnp.float32)}
    if not config.text.tie_embeddings:
        tree["head"] = {"kernel": leaf((D, V), jnp.float32)}
    return jax.tree.map(lambda x: leaf(x.shape, dtype), tree)


def _stack_shapes(layer: Params, num_layers: int) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_layers, *x.shape), x.dtype), layer)


def init_params(config: LlavaConfig, seed: int = 0, dtype: Any = jnp.float32) -> Params:
    """Random parameters: normal of standard deviation 1/sqrt(fan-in) for kernels, 0.02 for embeddings; ones, zeros."""

    def init(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path_name(path)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        kind = name.rsplit(".", 1)[-1]
        if kind == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        if kind == "bias":
            return jnp.zeros(leaf.shape, leaf.dtype)
        scale = 1 / math.sqrt(_fan_in(name, leaf.shape)) if kind == "kernel" else 0.02
        return (jax.random.normal(key, leaf.shape, jnp.float32) * scale).astype(leaf.dtype)

    return jax.tree.map_with_path(init, abstract_params(config, dtype))


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    shape = shape[1:] if name.startswith(("stages.", "vision.layers.")) else shape
    outputs = 2 if name.endswith((".q.kernel", ".k.kernel", ".v.kernel")) else 1
    return math.prod(shape[:-outputs])


def path_name(path: tuple) -> str:
    """A key path as dotted text: ``stages.0.mlp.up.kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def restage(params: Params, config: LlavaConfig, schedule: DropSchedule) -> Params:
    """Moves the stage boundaries of ``params`` from ``config.schedule`` to ``schedule``. Values are unchanged.

    Works on stacks of numpy and jax arrays, of which those that keep their layers are passed on, not copied, and on
    lists of layers.
    """
    L = config.text.num_layers
    old, new = config.schedule.layer_ranges(L), schedule.layer_ranges(L)
    stacks = [params["stages"][str(s)] for s in range(len(old))]
    if any(isinstance(stack, list) for stack in stacks):
        layers = [layer for stack in stacks for layer in stack]
        return {**params, "stages": {str(s): layers[slice(*edges)] for s, edges in enumerate(new)}}

    def stack_of(start: int, stop: int) -> Params:
        if (start, stop) in old:
            return stacks[old.index((start, stop))]

        def cut(*leaves: Any) -> Any:
            parts = [
                x[max(start - a, 0) : stop - a] for x, (a, b) in zip(leaves, old, strict=True) if a < stop and start < b
            ]
            numpy = isinstance(leaves[0], np.ndarray)
            return parts[0] if len(parts) == 1 else (np if numpy else jnp).concatenate(parts or [leaves[0][:0]])

        return jax.tree.map(cut, *stacks)

    return {**params, "stages": {str(s): stack_of(*edges) for s, edges in enumerate(new)}}


def unstack(params: Params) -> Params:
    """Every stack as a list of layers, each leaf an array of its own.

    Consumes ``params``: each stack is taken out of it as it is split, so that one leaf at a time stands twice in
    memory and not the whole model.
    """

    def split(stack: Params) -> list[Params]:
        columns = {key: split(x) if isinstance(x, dict) else list(jnp.asarray(x)) for key, x in _drain(stack)}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    params["vision"]["layers"] = split(params["vision"]["layers"])
    params["stages"] = {key: split(stack) for key, stack in _drain(params["stages"])}
    return params


def _drain(tree: Params) -> Iterator[tuple[str, Any]]:
    while tree:
        yield tree.popitem()
