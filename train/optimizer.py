"""AdamW or Muon as configured by a recipe, with a separate learning rate for each parameter group."""

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

MUON_RMS = 0.2  # RMS of an update, similar to that of AdamW (Liu et al., 2025, section 2.2)


def learning_rate(peak: float, warmup: float, steps: int, final_share: float = 0.0) -> optax.Schedule:
    """Linear warmup from 0 to ``peak``, followed by cosine decay to ``final_share`` of it.

    Args:
      warmup: fraction of ``steps``, rounded up to whole steps; at least one step is left for the decay.
    """
    warmup_steps = min(math.ceil(warmup * steps), max(steps, 1) - 1)
    first = 0.0 if warmup_steps else peak
    return optax.warmup_cosine_decay_schedule(first, peak, warmup_steps, max(steps, 1), peak * final_share)


@functools.cache  # a new optimizer object would make the training step recompile
def make_optimizer(config: LlavaConfig, recipe: OptimizerRecipe, steps: int) -> optax.GradientTransformation:
    """Optimizer of the trained parameters. Steps with a non-finite gradient are skipped and counted.

    Args:
      steps: number of steps of the whole run, for the learning rate schedule.
    """
    peaks = {
        "vision": recipe.vision_learning_rate,
        "compressor": None,
        "projector": recipe.projector_learning_rate,
        "lora": None,
        "llm": None,
        "standby": None,
    }
    rates = {
        group: optax.scale_by_learning_rate(
            learning_rate(recipe.learning_rate if peak is None else peak, recipe.warmup, steps, recipe.final_share)
        )
        for group, peak in peaks.items()
    }
    moments = optax.scale_by_adam(recipe.b1, recipe.b2, recipe.eps, mu_dtype=jnp.dtype(recipe.moment_dtype))
    if recipe.kind == "muon":
        moments = muon(
            -1.0,  # leaves the update unscaled: the learning rates of the groups are applied below
            adam_b1=recipe.b1,
            adam_b2=recipe.b2,
            eps=recipe.eps,
            mu_dtype=jnp.dtype(recipe.moment_dtype),
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(matrix_axes, params),
        )

    def matrix_axes(path: tuple, x: jax.Array) -> MuonDimensionNumbers | None:
        """Input and output axes of a matrix; None for LoRA adapters, embeddings, the head and non-matrices."""
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
    return optax.apply_if_finite(chain, max_consecutive_errors=2**31 - 1)  # never stop skipping; optax counts in int32
