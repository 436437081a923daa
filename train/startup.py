"""Summary of a training run, printed before it starts."""

import dataclasses
from collections import Counter
from collections.abc import Collection

from jax.sharding import AbstractMesh, Mesh

from pdrop_jax.analysis.cost import training_macs
from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.params import count
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.sharding import devices_along
from pdrop_jax.train.data.index import Dataset
from pdrop_jax.train.data.mixture import rows_per_source
from pdrop_jax.train.recipe import RunRecipe
from pdrop_jax.train.step import TrainState


def step_macs(config: LlavaConfig, dataset: Dataset, batch_size: int, groups: Collection[str], bucket: Bucket) -> float:
    """MACs of a step with ``batch_size`` rows that fill ``bucket`` and have the mean number of targets.

    Args:
      groups: trained parameter groups.
    """
    runs = dataset.spans.values.reshape(-1, 2)
    targets = float((runs[:, 1] - runs[:, 0]).sum()) / len(dataset)
    return batch_size * training_macs(config, bucket, targets, groups)


def few_rows(run: RunRecipe, mesh: Mesh | AbstractMesh) -> str:
    """A warning if microbatches are smaller than they should be; empty if they are not.

    Each microbatch gathers all weights and scatters all gradients along fsdp, however few tokens it has. That hides
    behind the products only if a device has several rows.
    """
    rows = run.batch_size // (devices_along("batch", mesh) * run.grad_accum_steps)
    if run.grad_accum_steps == 1 or mesh.shape["fsdp"] == 1 or rows > 1:
        return ""
    return (
        f"run.grad_accum_steps is {run.grad_accum_steps}, which leaves a device {rows} row at a time: weights are "
        f"gathered {run.grad_accum_steps} times a step, behind little work. Lower it as far as memory allows; "
        "pdrop plan --suggest finds the fastest number that fits a TPU"
    )


def shares(dataset: Dataset) -> list[str]:
    """A line for each source of a mixture: its part of an epoch, and how often an epoch reads its rows."""
    if len(dataset.sources) == 1:
        return []
    weights = dataset.weights
    rows = dataset.counts if weights is None else rows_per_source(dataset.counts, weights).tolist()
    return [
        f"            {n / sum(rows):6.1%} {source.path}: {n / count:.3g} x {count:,} rows per epoch"
        for source, n, count in zip(dataset.sources, rows, dataset.counts, strict=True)
    ]


def describe(
    run: RunRecipe, groups: Collection[str], config: LlavaConfig, dataset: Dataset, state: TrainState, steps: int
) -> str:
    """Summary of a run as text: data, steps, parameters, batch shapes, sequence slots of each stage, and cost."""
    planned = dataset.plan_epoch(run.batch_size, run.seed, 0)
    shapes = Counter((batch.bucket, batch.queries) for batch in planned)
    (bucket, _), _ = shapes.most_common(1)[0]
    slots = [stage.slots for stage in config.schedule.plan(config.text.num_layers, bucket)]
    dense = dataclasses.replace(config, schedule=DropSchedule.none())
    macs, dense_macs = (step_macs(c, dataset, run.batch_size, groups, bucket) for c in (config, dense))
    skipped = ", ".join(f"{count} {reason}" for reason, count in dataset.invalid.most_common())
    return "\n".join(
        [
            f"data        {len(dataset):,} rows, skipped: {skipped or 'none'}",
            *shares(dataset),
            f"steps       {steps:,} of {run.batch_size} rows, {len(planned):,} per epoch, "
            f"microbatches per step: {run.grad_accum_steps}",
            f"parameters  {count(state.trained):,} trained ({', '.join(groups)}), {count(state.frozen):,} frozen",
            f"shapes      {len(shapes)} to compile, most common: {bucket.text} text + {sum(bucket.images)} image slots",
            f"slots       {' -> '.join(map(str, slots))} by stage, drops after layers {list(config.schedule.layers)}",
            f"cost        {macs / 1e12:,.3f} T MACs per step, {macs / dense_macs:.1%} of dense",
        ]
    )
