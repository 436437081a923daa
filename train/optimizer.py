"""AdamW or Muon as a recipe describes it, and which group a parameter belongs to."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from pdrop_jax.model.layers import Params
from pdrop_jax.model.params import path_name
from pdrop_jax.train.recipe import OptimizerRecipe

NEVER_DECAYED = ("scale", "bias")

# Axes of each kind of kernel, counted from behind, that are its matrix: (reduced, output). Stacks have more in front.
MATRICES = {
    "q": ((-3,), (-2, -1)),
    "k": ((-3,), (-2, -1)),
    "v": ((-3,), (-2, -1)),
    "o": ((-3, -2), (-1,)),
    "patch": ((-4, -3, -2), (-1,)),
    "gate": ((-2,), (-1,)),
    "up": ((-2,), (-1,)),
    "down": ((-2,), (-1,)),
    "linear_0": ((-2,), (-1,)),
    "linear_1": ((-2,), (-1,)),
}
MUON_RMS = 0.2  # of an update, as AdamW's are about (Liu et al., 2025, section 2.2)


def group_of(name: str) -> str:
    """The group of a parameter's dotted name: vision, projector, lora or llm."""
    first = name.partition(".")[0]
    if first in ("vision", "projector"):
        return first
    return "lora" if ".lora." in name else "llm"


def learning_rate(peak: float, warmup: float, steps: int) -> optax.Schedule:
    """From 0 up to ``peak`` over ceil(warmup * steps) steps but not all, then a cosine to 0."""
    warmup_steps = min(math.ceil(warmup * steps), max(steps, 1) - 1)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup_steps else peak, peak, warmup_steps, max(steps, 1))


@functools.cache  # or a step would compile again for each object, equal as they are
def make_optimizer(recipe: OptimizerRecipe, steps: int) -> optax.GradientTransformation:
    """Over the trained parameters; a step whose gradient is not finite changes nothing and is counted.

    Args:
      steps: of the whole run.
    """
    peaks = {
        "vision": recipe.vision_learning_rate,
        "projector": recipe.projector_learning_rate,
        "lora": None,
        "llm": None,
    }
    rates = {
        group: optax.scale_by_learning_rate(
            learning_rate(recipe.learning_rate if peak is None else peak, recipe.warmup, steps)
        )
        for group, peak in peaks.items()
    }
    moments = optax.scale_by_adam(recipe.b1, recipe.b2, recipe.eps, mu_dtype=jnp.dtype(recipe.moment_dtype))
    if recipe.kind == "muon":
        moments = muon(
            -1.0,  # the direction as it is: optax has it with a rate only, and that comes below, by group
            adam_b1=recipe.b1,
            adam_b2=recipe.b2,
            eps=recipe.eps,
            mu_dtype=jnp.dtype(recipe.moment_dtype),
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(_matrix, params),
        )
    chain = optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        moments,
        optax.add_decayed_weights(recipe.weight_decay, mask=_decayed),
        optax.partition(rates, lambda params: _by_name(params, group_of)),
    )
    return optax.apply_if_finite(chain, max_consecutive_errors=2**31 - 1)  # never give up; optax counts in int32


def _matrix(path: tuple, x: jax.Array) -> MuonDimensionNumbers | None:
    """None for what is not orthogonalized."""
    *_, module, kind = path_name(path).rsplit(".", 2)
    if kind != "kernel" or module not in MATRICES:
        return None
    return MuonDimensionNumbers(*(tuple(axis + x.ndim for axis in axes) for axes in MATRICES[module]))


def _decayed(params: Params) -> Params:
    return _by_name(params, lambda name: name.rpartition(".")[2] not in NEVER_DECAYED)


def _by_name(params: Params, of: Callable[[str], Any]) -> Params:
    return jax.tree.map_with_path(lambda path, _: of(path_name(path)), params)
