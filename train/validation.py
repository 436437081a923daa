"""The loss on held-out conversations during training."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.loss import compute_loss, count_targets
from pdrop_jax.model.params import Params
from pdrop_jax.sharding import devices_along
from pdrop_jax.train.data.pipeline import Dataset, check_batches, open_dataset, pipeline
from pdrop_jax.train.data.standby import standby_view
from pdrop_jax.train.recipe import ImageMode, Recipe
from pdrop_jax.train.step import TrainState, join, place_rows


@dataclasses.dataclass(frozen=True)
class Validation:
    """Held-out rows, of which the same batches are read every time.

    Attributes:
      rows: rows of a batch, as many as a microbatch of training has.
      batches: number of batches.
      mode: what pictures are shown by; all their tokens if both are trained.
    """

    dataset: Dataset
    rows: int
    batches: int
    seed: int
    mode: ImageMode = "focus"

    def view(self, batch: Batch, config: LlavaConfig) -> Batch:
        return standby_view(batch, config) if self.mode == "standby" else batch

    def run(self, config: LlavaConfig, state: TrainState, mesh: Mesh, dtype: Any) -> Mapping[str, float]:
        """The loss with the parameters of ``state``: the mean cross-entropy over all targets of all batches."""
        steps = pipeline(
            self.dataset,
            self.rows,
            self.seed,
            self.batches,
            parts=devices_along("batch", mesh),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        sums = [
            batch_loss(
                config, state.trained, state.frozen, place_rows(self.view(step.batch, config), mesh), dtype=dtype
            )
            for step in steps
        ]
        totals, targets = zip(*jax.device_get(sums), strict=True)
        count = sum(map(int, targets))
        return {"validation_loss": sum(map(float, totals)) / max(count, 1), "validation_targets": count}


def open_validation(recipe: Recipe, config: LlavaConfig, mesh: Mesh) -> Validation | None:
    """Opens the data of ``recipe.validation``; None if there is none.

    Raises:
      UserError: see ``open_dataset`` and ``check_batches``.
    """
    wanted, run = recipe.validation, recipe.run
    if wanted.conversations is None:
        return None
    data = dataclasses.replace(
        recipe.data, conversations=wanted.conversations, images=wanted.images or recipe.data.images, sources=()
    )
    dataset = open_dataset(data, config, recipe.model.start)
    rows = run.batch_size // run.grad_accum_steps
    check_batches(dataset, rows, devices_along("batch", mesh), jax.process_count())
    return Validation(dataset, rows, min(wanted.batches, len(dataset) // rows), run.seed, data.image_mode)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def batch_loss(
    config: LlavaConfig, trained: Params, frozen: Params, batch: Batch, *, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """(sum of the cross-entropies, number of targets) of a batch, both ()."""
    params = join(jax.tree.map(lambda x: x.astype(dtype), trained), frozen)
    return compute_loss(config, params, batch)[0], count_targets(jnp.asarray(batch.labels))
