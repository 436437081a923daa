"""What a run will do, said before it begins."""

import dataclasses
from collections import Counter

from pdrop_jax.analysis.cost import training_macs
from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.params import count
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.data.index import Dataset
from pdrop_jax.train.recipe import Recipe
from pdrop_jax.train.step import TrainState


def step_macs(config: LlavaConfig, dataset: Dataset, recipe: Recipe, bucket: Bucket) -> float:
    """MACs of a step all of whose rows fill ``bucket`` and have the mean number of targets."""
    runs = dataset.spans.values.reshape(-1, 2)
    targets = float((runs[:, 1] - runs[:, 0]).sum()) / len(dataset)
    return recipe.run.batch_size * training_macs(config, bucket, targets, recipe.model.groups)


def describe(recipe: Recipe, config: LlavaConfig, dataset: Dataset, state: TrainState, steps: int) -> str:
    """The plan of a run as text: data, parameters, shapes, tokens of each stage, cost."""
    run = recipe.run
    planned = dataset.plan(run.batch_size, run.seed, 0)
    shapes = Counter((batch.bucket, batch.queries) for batch in planned)
    (bucket, _), _ = shapes.most_common(1)[0]
    slots = [stage.slots for stage in config.schedule.plan(config.text.num_layers, bucket)]
    dense = dataclasses.replace(config, schedule=DropSchedule.none())
    macs, dense_macs = (step_macs(c, dataset, recipe, bucket) for c in (config, dense))
    left_out = ", ".join(f"{count} {reason}" for reason, count in dataset.invalid.most_common())
    return "\n".join(
        [
            f"data        {len(dataset):,} rows, left out: {left_out or 'none'}",
            f"steps       {steps:,} of {run.batch_size} rows, {len(planned):,} an epoch, "
            f"in {run.grad_accum_steps} parts",
            f"parameters  {count(state.trained):,} trained ({', '.join(recipe.model.groups)}), "
            f"{count(state.frozen):,} frozen",
            f"shapes      {len(shapes)} to compile, most common {bucket.text} text + {sum(bucket.images)} image slots",
            f"slots       {' -> '.join(map(str, slots))} by stage, after layers {list(config.schedule.layers)}",
            f"cost        {macs / 1e12:,.3f} T MACs a step, {macs / dense_macs:.1%} of dense",
        ]
    )
