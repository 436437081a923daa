"""What is measured every so many steps besides the training itself: the validation loss and a benchmark's score."""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pdrop_jax.config import LlavaConfig
from pdrop_jax.train.evaluation import open_evaluation
from pdrop_jax.train.progress import Progress
from pdrop_jax.train.recipe import Recipe
from pdrop_jax.train.step import TrainState
from pdrop_jax.train.timing import VALIDATING
from pdrop_jax.train.validation import open_validation


@dataclasses.dataclass(frozen=True)
class Check:
    """A measurement of the current parameters.

    Attributes:
      name: name of its event in the log.
      every: steps between two measurements.
      run: computes named scalars from (config, state, mesh, compute dtype). Called in all processes; the result of
        process 0 counts.
    """

    name: str
    every: int
    run: Callable[[LlavaConfig, TrainState, Mesh, Any], Mapping[str, float]]


def open_checks(recipe: Recipe, config: LlavaConfig, mesh: Mesh) -> list[Check]:
    """The checks that a recipe asks for.

    Raises:
      UserError: their files are invalid or do not fit the model.
    """
    validation, evaluation = open_validation(recipe, config, mesh), open_evaluation(recipe, config)
    checks = [Check("validation", recipe.validation.every, validation.run)] if validation else []
    return checks + ([Check("evaluation", recipe.evaluation.every, evaluation.run)] if evaluation else [])


def due_checks(checks: Sequence[Check], step: int, steps: int) -> list[Check]:
    """The checks that are made after ``step`` of ``steps``."""
    return [check for check in checks if step and (step % check.every == 0 or step == steps)]


def missing_checks(checks: Sequence[Check], step: int, steps: int, logged: Collection[str]) -> list[Check]:
    """The checks of ``step`` that a run was stopped or killed before; the same in all processes.

    Args:
      logged: names of the events of ``step`` in the log, as process 0 knows them.
    """
    due = due_checks(checks, step, steps)
    if not due:
        return []
    missing = multihost_utils.broadcast_one_to_all(np.array([check.name not in logged for check in due]))
    return [check for check, is_missing in zip(due, missing.tolist(), strict=True) if is_missing]


def run_checks(
    checks: Sequence[Check],
    step: int,
    config: LlavaConfig,
    state: TrainState,
    mesh: Mesh,
    dtype: Any,
    progress: Progress,
) -> None:
    """Runs ``checks`` and reports their results as those of ``step``."""
    for check in checks:
        began = time.perf_counter()
        with progress.timer.spending(VALIDATING):
            values = check.run(config, state, mesh, dtype)
        seconds = time.perf_counter() - began
        progress.event(check.name, step, **values, seconds=seconds)
        progress.scalars(step, values)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:,.5g}" for name, value in values.items())
        progress.say(f"{check.name:11} step {step:,}: {shown} ({seconds:.1f} s)")
