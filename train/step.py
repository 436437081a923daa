"""One optimizer step: gradients of a batch, in parts if asked, and AdamW on the trained parameters.

Trained parameters are float32 masters, cast to the compute dtype in the step; frozen ones are kept in that dtype and
get no gradient at all.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.attention import Implementation
from pdrop_jax.model.layers import Remat
from pdrop_jax.model.loss import compute_loss, count_targets
from pdrop_jax.model.params import Params, path_name, spec_of
from pdrop_jax.model.placement import constrain_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What a step changes, and the parameters that it does not.

    Attributes:
      step: () int32, steps taken, skipped ones too.
      trained: float32 parameters.
      frozen: the rest, in the compute dtype.
      optimizer: optax's state.
    """

    step: jax.Array
    trained: Params
    frozen: Params
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Metrics:
    """Scalars of a step.

    Attributes:
      loss: mean cross-entropy over the targets, float32.
      grad_norm: before clipping, float32.
      targets: int32.
      tokens: valid slots of the batch, images included, int32.
      skipped: steps so far whose gradient was not finite, int32.
      skipped_in_row: those of them that were the last steps, one after the other, int32.
    """

    loss: jax.Array
    grad_norm: jax.Array
    targets: jax.Array
    tokens: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array


def split(config: LlavaConfig, params: Params, groups: Collection[str]) -> tuple[Params, Params]:
    """(trained parameters of ``groups``, the others), each the whole tree with None in place of what it lacks."""

    def is_trained(path: tuple) -> bool:
        spec = spec_of(config, path_name(path))
        return spec.group in groups and not spec.constant

    trained = jax.tree.map_with_path(lambda path, x: x if is_trained(path) else None, params)
    frozen = jax.tree.map_with_path(lambda path, x: None if is_trained(path) else x, params)
    return trained, frozen


def join(trained: Params, frozen: Params) -> Params:
    """The whole tree again."""
    return jax.tree.map(lambda x, y: y if x is None else x, trained, frozen, is_leaf=lambda x: x is None)


def init_state(
    config: LlavaConfig, params: Params, groups: Collection[str], optimizer: optax.GradientTransformation, dtype: Any
) -> TrainState:
    """The state before the first step.

    Args:
      params: the whole tree, of any float dtype.
      groups: what is trained, of "vision", "projector", "llm" and "lora".
      dtype: of the computation.
    """
    trained, frozen = split(config, params, groups)
    trained = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), trained)
    frozen = jax.tree.map(lambda x: jnp.asarray(x, dtype), frozen)
    return TrainState(jnp.int32(0), trained, frozen, optimizer.init(trained))


def changing(state: TrainState) -> dict[str, Any]:
    """What a checkpoint has to hold of a state."""
    return {"trained": state.trained, "optimizer": state.optimizer}


def not_finite(tree: Any) -> list[str]:
    """The dotted names of the arrays that hold NaN or infinity. They are looked through where they are."""
    names = {path_name(path): x for path, x in jax.tree.leaves_with_path(tree)}
    return [name for name, finite in jax.device_get(_all_finite(names)).items() if not finite]


@jax.jit
def _all_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in arrays.items()}


@functools.partial(
    jax.jit,
    static_argnames=("config", "optimizer", "dtype", "grad_accum_steps", "remat", "implementation"),
    donate_argnames=("state",),
)
def train_step(
    config: LlavaConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    *,
    dtype: Any = jnp.bfloat16,
    grad_accum_steps: int = 1,
    remat: Remat = "full",
    implementation: Implementation = "auto",
) -> tuple[TrainState, Metrics]:
    """One step. Consumes ``state``; compiles once for each bucket and number of query rows.

    The loss is the mean over all targets of the batch, however it is cut, so the parts change nothing but memory.

    Args:
      batch: B rows with labels.
      grad_accum_steps: parts that the rows are cut into, one after the other; a divisor of B.
    """
    targets = count_targets(jnp.asarray(batch.labels))

    def loss_of_part(trained: Params, part: Batch) -> jax.Array:
        params = join(jax.tree.map(lambda x: x.astype(dtype), trained), state.frozen)
        total, _ = compute_loss(config, params, part, implementation=implementation, remat=remat)
        return total / jnp.maximum(targets, 1)

    def add_part(carry: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss_of_part)(state.trained, part)), None

    if grad_accum_steps == 1:
        loss, gradient = jax.value_and_grad(loss_of_part)(state.trained, batch)
    else:
        # Every part takes rows of all devices: part i is rows i, i + grad_accum_steps, …
        # The rows of a part are counted: -1 would be ambiguous for arrays without elements, the crops of a batch
        # without pictures.
        rows = batch.length.shape[0] // grad_accum_steps
        parts = jax.tree.map(lambda x: x.reshape(rows, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), batch)
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained))
        (loss, gradient), _ = jax.lax.scan(add_part, zero, parts)
    updates, moments = optimizer.update(gradient, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    tokens = jnp.asarray(batch.length).sum()
    skipped = moments.total_notfinite, moments.notfinite_count
    metrics = Metrics(loss, optax.tree.norm(gradient), targets, tokens, *skipped)
    # Where it was: what lay elsewhere would make the next step compile again.
    trained, moments = constrain_params(config, (trained, moments))
    return TrainState(state.step + 1, trained, state.frozen, moments), metrics
