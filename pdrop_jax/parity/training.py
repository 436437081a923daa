"""Training cases of ``pdrop check``: loss, kept tokens and gradients."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdrop_jax.batch import Batch
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.model.drop import DropRecord
from pdrop_jax.model.loss import compute_loss, count_targets
from pdrop_jax.model.params import Params
from pdrop_jax.parity.report import Figures, error

ToTorch = Callable[[LlavaConfig, Params], dict[str, np.ndarray]]
ANGLE = 0.37  # the recorded dot product is that of the gradient and cos(ANGLE * n)
FLOOR = 1e-2  # makes TOLERANCE["gradients"] 1e-4 * absmax + 1e-6


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def _loss_and_gradient(config: LlavaConfig, params: Params, batch: Batch, implementation: Implementation) -> Any:
    def mean(params: Params) -> tuple[jax.Array, tuple[DropRecord, ...]]:
        total, drops = compute_loss(config, params, batch, implementation=implementation, remat="full")
        return total / count_targets(jnp.asarray(batch.labels)), drops

    return jax.value_and_grad(mean, has_aux=True)(params)


def compare_training(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    arrays: Mapping[str, np.ndarray],
    info: Any,
    to_torch: ToTorch,
    folder: pathlib.Path,
    implementation: Implementation = "auto",
) -> tuple[Figures, tuple[DropRecord, ...]]:
    """Compares the loss of ``batch``, every recorded gradient, and the fingerprints of all gradients."""
    (loss, drops), gradient = _loss_and_gradient(config, params, batch, implementation)
    ours = to_torch(config, jax.device_get(gradient))
    relative = []
    if "grad_file" in info:
        with np.load(folder / info["grad_file"]) as recorded:
            relative += [_relative(ours[name], recorded[name]) for name in recorded]
    for n, name in enumerate(info["grad_fingerprint_params"]):
        own = ours[name].astype(np.float64).ravel()
        relative.append(_relative(np.abs(own).max(), arrays["grad_absmax"][n]))
        scale = arrays["grad_l2"][n]
        relative.append(_relative(np.sqrt((own**2).sum()), scale))
        dot = (own * np.cos(ANGLE * np.arange(own.size))).sum()
        relative.append(_relative(dot, arrays["grad_dot"][n], scale))
    return {"loss": error(loss, arrays["loss"]), "gradients": max(relative)}, drops


def _relative(ours: Any, theirs: np.ndarray, scale: Any = None) -> float:
    largest = np.abs(theirs).max() if scale is None else scale
    return error(ours, np.asarray(theirs)) / (float(largest) + FLOOR)
