"""AdamW or Muon as a recipe describes it, with a learning rate for each group of parameters."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.params import Params, ParamSpec, path_name, spec_of
from pdrop_jax.train.recipe import OptimizerRecipe

MUON_RMS = 0.2  # of an update, similar to AdamW's (Liu et al., 2025, section 2.2)


def learning_rate(peak: float, warmup: float, steps: int) -> optax.Schedule:
    """From 0 up to ``peak`` over ceil(warmup * steps) steps, all but the last at most, then a cosine to 0."""
    warmup_steps = min(math.ceil(warmup * steps), max(steps, 1) - 1)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup_steps else peak, peak, warmup_steps, max(steps, 1))


@functools.cache  # a new object would make the step compile again
def make_optimizer(config: LlavaConfig, recipe: OptimizerRecipe, steps: int) -> optax.GradientTransformation:
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
            -1.0,  # the direction as it is: optax only has it with a rate, and rates differ by group, see below
            adam_b1=recipe.b1,
            adam_b2=recipe.b2,
            eps=recipe.eps,
            mu_dtype=jnp.dtype(recipe.moment_dtype),
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(matrix_axes, params),
        )

    def matrix_axes(path: tuple, x: jax.Array) -> MuonDimensionNumbers | None:
        """None for what is not orthogonalized: adapters, embeddings, the head and all that is not a matrix."""
        spec = spec_of(config, path_name(path))
        if not spec.inputs or spec.group == "lora" or "vocab" in spec.axes:
            return None
        first = x.ndim - len(spec.shape)
        return MuonDimensionNumbers(*(tuple(axis + first for axis in axes) for axes in (spec.inputs, spec.outputs)))

    def by_spec(of: Callable[[ParamSpec], Any]) -> Callable[[Params], Any]:
        return lambda params: jax.tree.map_with_path(lambda path, _: of(spec_of(config, path_name(path))), params)

    chain = optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        moments,
        optax.add_decayed_weights(recipe.weight_decay, mask=by_spec(lambda spec: spec.decayed)),
        optax.partition(rates, by_spec(lambda spec: spec.group)),
    )
    return optax.apply_if_finite(chain, max_consecutive_errors=2**31 - 1)  # never give up; optax counts in int32
