"""Stacks of layers: moved between drop schedules, or taken apart.

The parameters hold one stack for each stage, which is scanned. On CPUs and GPUs the scan copies the weights of each
layer out of the stack before it multiplies, so there ``unstack`` turns every stack into a list of layers, which the
model runs as a plain loop.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.params import Params
from pdrop_jax.schedule import DropSchedule


def restage(params: Params, config: LlavaConfig, schedule: DropSchedule) -> Params:
    """Moves the stage boundaries of ``params`` from ``config.schedule`` to ``schedule``. Values are unchanged.

    Works on stacks of numpy or jax arrays, where a stack that keeps its layers is passed on without a copy, and on
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

        def join(*leaves: Any) -> Any:
            parts = [
                x[max(start - a, 0) : stop - a] for x, (a, b) in zip(leaves, old, strict=True) if a < stop and start < b
            ]
            numpy = isinstance(leaves[0], np.ndarray)
            return parts[0] if len(parts) == 1 else (np if numpy else jnp).concatenate(parts or [leaves[0][:0]])

        return jax.tree.map(join, *stacks)

    return {**params, "stages": {str(s): stack_of(*edges) for s, edges in enumerate(new)}}


def unstack(params: Params) -> Params:
    """Every stack as a list of layers, each leaf an array of its own.

    Consumes ``params``: each stack is removed from it as it is split, so that no more than one leaf is in memory twice.
    """

    def rows(x: Any) -> list[Any]:
        leaves, structure = jax.tree.flatten(x)  # two for int8 weights, one otherwise
        columns = [list(jnp.asarray(leaf)) for leaf in leaves]
        return [jax.tree.unflatten(structure, row) for row in zip(*columns, strict=True)]

    def split(stack: Params) -> list[Params]:
        columns = {key: split(x) if isinstance(x, dict) else rows(x) for key, x in _drain(stack)}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    for name in ("layers", "later_layers"):
        if name in params["vision"]:
            params["vision"][name] = split(params["vision"][name])
    params["stages"] = {key: split(stack) for key, stack in _drain(params["stages"])}
    return params


def _drain(tree: Params) -> Iterator[tuple[str, Any]]:
    while tree:
        yield tree.popitem()
