"""One optimizer step: gradients of a batch, optionally accumulated over microbatches, and the parameter update.

Trained parameters are float32 master weights, cast to the compute dtype inside the step. Frozen parameters are stored
in the compute dtype and have no gradients.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pdrop_jax.batch import Batch
from pdrop_jax.config import Implementation, LlavaConfig, Remat
from pdrop_jax.model.loss import compute_loss, count_targets
from pdrop_jax.model.params import Params, path_name, spec_of
from pdrop_jax.model.placement import constrain_params
from pdrop_jax.sharding import batch_sharding

# Along fsdp every product needs its weight gathered, or its gradient summed and scattered. By default the TPU compiler
# does both piece by piece while the product runs, in as many pieces as there are devices. For a gradient that is best,
# but a product of a weight in pieces reads and writes its result for each of them. Without that the gather of the next
# weight runs beside a product, which is the default on v5e and what the other options ask for elsewhere.
WHOLE_WEIGHTS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
# With few tokens it sums whole gradients on every device, unless it is told to cut these, too.
FEW_ROWS = {**WHOLE_WEIGHTS, "xla_tpu_reduce_scatter_collective_matmul_mode": "post_spmd"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Training state: parameters, optimizer state and step count.

    Attributes:
      step: () int32, number of steps taken, including skipped steps.
      trained: trained parameters, float32.
      frozen: frozen parameters, in the compute dtype.
      optimizer: optax optimizer state.
    """

    step: jax.Array
    trained: Params
    frozen: Params
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Metrics:
    """Scalar metrics of a step.

    Attributes:
      loss: mean cross-entropy over the targets, float32.
      grad_norm: global gradient norm before clipping, float32.
      targets: number of target tokens, int32.
      tokens: number of valid slots of the batch, including image tokens, int32.
      pictures: number of images of the batch, int32.
      skipped: number of steps so far that were skipped for a non-finite gradient, int32.
      skipped_in_row: number of consecutive skipped steps up to this one, int32.
    """

    loss: jax.Array
    grad_norm: jax.Array
    targets: jax.Array
    tokens: jax.Array
    pictures: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array


def split(config: LlavaConfig, params: Params, groups: Collection[str]) -> tuple[Params, Params]:
    """Splits parameters into (trained, frozen). Both are full trees, with None for the leaves of the other one."""

    def is_trained(path: tuple) -> bool:
        spec = spec_of(config, path_name(path))
        return spec.group in groups and not spec.constant

    trained = jax.tree.map_with_path(lambda path, x: x if is_trained(path) else None, params)
    frozen = jax.tree.map_with_path(lambda path, x: None if is_trained(path) else x, params)
    return trained, frozen


def join(trained: Params, frozen: Params) -> Params:
    """Merges the two trees of ``split``."""
    return jax.tree.map(lambda x, y: y if x is None else x, trained, frozen, is_leaf=lambda x: x is None)


def init_state(
    config: LlavaConfig, params: Params, groups: Collection[str], optimizer: optax.GradientTransformation, dtype: Any
) -> TrainState:
    """Training state before the first step.

    Args:
      params: all parameters, of any float dtype.
      groups: trained parameter groups, out of those of ``config.Group``.
      dtype: compute dtype.
    """
    trained, frozen = split(config, params, groups)
    trained = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), trained)
    frozen = jax.tree.map(lambda x: jnp.asarray(x, dtype), frozen)
    return TrainState(step=jnp.int32(0), trained=trained, frozen=frozen, optimizer=optimizer.init(trained))


def changing(state: TrainState) -> dict[str, Any]:
    """The part of a state that training changes, which a checkpoint has to store."""
    return {"trained": state.trained, "optimizer": state.optimizer}


def not_finite(tree: Any) -> list[str]:
    """Dotted names of the arrays that contain NaN or infinity. The check runs on the devices."""
    names = {path_name(path): x for path, x in jax.tree.leaves_with_path(tree)}
    return [name for name, finite in jax.device_get(_all_finite(names)).items() if not finite]


@jax.jit
def _all_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in arrays.items()}


def _train_step(
    config: LlavaConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch | tuple[Batch, ...],
    *,
    dtype: Any = jnp.bfloat16,
    grad_accum_steps: int = 1,
    remat: Remat = "full",
    implementation: Implementation = "auto",
) -> tuple[TrainState, Metrics]:
    """Runs one optimizer step. Donates ``state``; compiles once for each bucket and number of query rows.

    The loss is the mean over all targets of the batch, so the number of microbatches affects only memory, not the loss.

    Args:
      batch: B rows with labels. Of several batches with the same targets the loss is the mean of theirs.
      dtype: compute dtype.
      grad_accum_steps: number of microbatches; must divide B.

    Returns:
      The new state, and the metrics of the step.
    """
    batches = batch if isinstance(batch, tuple) else (batch,)
    batch = batches[0]
    targets = count_targets(jnp.asarray(batch.labels))

    def microbatch_loss(trained: Params, parts: tuple[Batch, ...]) -> jax.Array:
        params = join(jax.tree.map(lambda x: x.astype(dtype), trained), state.frozen)
        totals = [compute_loss(config, params, x, implementation=implementation, remat=remat)[0] for x in parts]
        return sum(totals[1:], totals[0]) / len(totals) / jnp.maximum(targets, 1)

    def add_microbatch(carry: Any, part: tuple[Batch, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(microbatch_loss)(state.trained, part)), None

    if grad_accum_steps == 1:
        loss, gradient = jax.value_and_grad(microbatch_loss)(state.trained, batches)
    else:
        # Microbatch i has rows i, i + grad_accum_steps, …, so that every microbatch has rows of all devices.
        # Its number of rows is computed, because -1 would be ambiguous for empty arrays (the crops of a batch without
        # images).
        rows = batch.length.shape[0] // grad_accum_steps
        parts = jax.tree.map(lambda x: x.reshape(rows, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), batches)
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained))
        (loss, gradient), _ = jax.lax.scan(add_microbatch, zero, parts)
    with jax.named_scope("optimizer"):
        updates, moments = optimizer.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
    metrics = Metrics(
        loss=loss,
        grad_norm=optax.tree.norm(gradient),
        targets=targets,
        tokens=jnp.asarray(batch.length).sum(),
        pictures=jnp.asarray(batch.image_id).max(1, initial=0).sum(),
        skipped=moments.total_notfinite,
        skipped_in_row=moments.notfinite_count,
    )
    # Keep the sharding of the state: a different sharding would make the next step recompile.
    trained, moments = constrain_params(config, (trained, moments))
    return TrainState(step=state.step + 1, trained=trained, frozen=state.frozen, optimizer=moments), metrics


def place_rows(batch: Any, mesh: Mesh) -> Any:
    """Global arrays from a batch, or a tuple of them, with the rows of this process."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


_jitted = functools.partial(
    jax.jit,
    _train_step,
    static_argnames=("config", "optimizer", "dtype", "grad_accum_steps", "remat", "implementation"),
    donate_argnames=("state",),
)
train_step = _jitted()


def compiler_options(platform: str, rows: int) -> dict[str, str]:
    """What ``train_step`` is compiled with on a platform such as "tpu", for ``rows`` rows of a device at a time."""
    if platform != "tpu":
        return {}
    return FEW_ROWS if rows == 1 else WHOLE_WEIGHTS


def train_step_with(options: Mapping[str, str]) -> Any:
    """``train_step``, compiled with some options."""
    return _with_options(tuple(sorted(options.items()))) if options else train_step


@functools.cache
def _with_options(options: tuple[tuple[str, str], ...]) -> Any:
    return _jitted(compiler_options=dict(options))


def unknown_options(options: dict[str, str]) -> list[str]:
    """Names of those options that the compiler of this process's devices does not know.

    A program with one of them is not compiled, and libtpu has other options in other versions.
    """

    def known(some: dict[str, str]) -> bool:
        try:
            jax.jit(jnp.negative, compiler_options=some).lower(np.float32(0)).compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    return [] if not options or known(options) else [name for name in options if not known({name: options[name]})]
