"""``pdrop tune``: samples to a schedule, by allocation or by search, and the checkpoint that it is saved in."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pdrop_jax import checkpoint
from pdrop_jax.analysis.budget import Budget, schedule_for_budget
from pdrop_jax.analysis.tune.allocation import (
    BudgetTooSmall,
    allocate,
    candidate_layers,
    drop_shares,
    rescaled_sensitivity,
)
from pdrop_jax.analysis.tune.calibrate import Calibration, calibrate, read_samples
from pdrop_jax.analysis.tune.search import Objective, Point, search
from pdrop_jax.eval.journal import Journal, remove_unfinished
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.model.scores import find_score
from pdrop_jax.paths import as_path
from pdrop_jax.schedule import DropSchedule


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked for.

    Attributes:
      keep: budget as a share of the image tokens, averaged over layers; None is ``budget``.
      layers: drop layers, or None for those that the calibration or the budget suggests.
      fields: the schedule's positions, score and weights.
      rounds: passes of the search; 0 allocates instead.
      deployed: identifies the model and its quantization, so that a search is resumed for the same ones only.
    """

    budget: Budget | None
    keep: float | None
    layers: tuple[int, ...] | None
    fields: DropSchedule
    rounds: int = 0
    batch_size: int = 8
    deployed: str = ""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A schedule and what it was found by; ``kl`` is the search's objective, None without a search."""

    schedule: DropSchedule
    calibration: Calibration
    kl: float | None

    def as_json(self) -> dict[str, Any]:
        measured = {
            name: x.tolist() if isinstance(x, np.ndarray) else x
            for name, x in dataclasses.asdict(self.calibration).items()
        }
        return {"schedule": self.schedule.to_json(), "kl": self.kl, **measured}


def tune(
    exact: Model, deployed: Model, questions: Sequence[Question], task: Task, out: str | os.PathLike | None = None
) -> Tuned:
    """Calibrates on ``questions`` and allocates or searches.

    Args:
      exact: the model in float; ``deployed``: the same one quantized, or the same object.
      out: the results of a search are kept beside this path until ``save`` has written it.

    Raises:
      UserError: a question has no picture, a layer or the score is not there, or the budget cannot be met.
    """
    text = exact.config.text
    if task.layers is not None:  # before anything is computed
        DropSchedule(task.layers, (0.0,) * len(task.layers)).check(text.num_layers)
    find_score(dataclasses.replace(deployed.config, schedule=task.fields))
    samples = read_samples(deployed, questions, task.batch_size)
    measured = calibrate(exact, deployed, samples)
    budget = task.budget or Budget("average tokens", (task.keep or 0.0) * measured.image_tokens)

    def with_layers(layers: Sequence[int]) -> DropSchedule:
        return dataclasses.replace(task.fields, layers=tuple(layers), ratios=(0.0,) * len(layers))

    if not task.rounds:
        layers = task.layers or candidate_layers(measured.attention, max(2, exact.config.additions))
        sensitivity = rescaled_sensitivity(measured.sensitivity)
        while True:
            try:
                shares = drop_shares(sensitivity[list(layers)])
                schedule = allocate(text, with_layers(layers), shares, budget, measured.image_tokens)
                return Tuned(schedule, measured, None)
            except BudgetTooSmall:
                if task.layers or len(layers) == 1:
                    raise
                layers = layers[:-1]  # earlier drops leave fewer tokens
    start = _start(exact, task, budget, measured.image_tokens)
    allocate(text, with_layers(start.layers), start.shares, budget, measured.image_tokens)  # before the model runs
    objective = Objective(exact, deployed, samples, task.fields)
    with _remembered(objective, _identity(exact, questions, task), out) as remembered:
        schedule, kl = search(text, start, task.fields, budget, measured.image_tokens, remembered, rounds=task.rounds)
    return Tuned(schedule, measured, kl)


def save(folder: pathlib.Path, out: pathlib.Path, schedule: DropSchedule) -> None:
    """Writes the checkpoint in ``folder``, as it is, with ``schedule`` to the new folder ``out``."""
    config, params = checkpoint.load(folder, schedule=schedule, verify=False)
    checkpoint.save(out, config, params, companions=folder, training=checkpoint.training(folder))
    remove_unfinished(_results(out))


def _start(model: Model, task: Task, budget: Budget, image_tokens: int) -> Point:
    """Where a search begins: at the geometric schedule for the budget, which `pdrop cost` finds."""
    names = {"average tokens": "average_tokens", "MACs": "macs", "cache bytes": "cache_bytes"}
    limit: dict[str, Any] = {names[budget.name]: budget.value}
    text = model.config.text
    geometric = schedule_for_budget(text, **limit, layers=task.layers, image_tokens=image_tokens)
    layers, ratios = geometric.layers, geometric.ratios
    if not layers:  # the budget is above the dense cost: allocate says so
        layers, ratios = task.layers or (text.num_layers // 2,), (0.0,)
    drops = -np.diff([1.0, *ratios])
    return Point(layers, tuple(float(x) for x in drops / drops.sum()))


def _identity(exact: Model, questions: Sequence[Question], task: Task) -> str:
    """A hash of what a candidate's value depends on besides the candidate."""
    asked = [[question.text, *map(str, question.images)] for question in questions]
    about = [task.deployed, repr(exact.config), str(exact.dtype), asked, task.batch_size]
    return hashlib.blake2b(json.dumps(about).encode(), digest_size=11).hexdigest()


def _results(out: str | os.PathLike) -> pathlib.Path:
    """Whose unfinished file holds a search's values. ``OUT.unfinished`` is the checkpoint while it is written."""
    path = as_path(out)
    return path.with_name(f"{path.name}.search")


@contextlib.contextmanager
def _remembered(
    objective: Callable[[DropSchedule], float], identity: str, out: str | os.PathLike | None
) -> Iterator[Callable[[DropSchedule], float]]:
    """``objective`` with the values of an earlier, interrupted search of the same identity."""
    if out is None:
        yield objective
        return
    with Journal(_results(out)) as journal:

        def value(schedule: DropSchedule) -> float:
            key = f"{identity} {json.dumps(schedule.to_json(), sort_keys=True)}"
            if key not in journal.answers:
                journal.append([{"answer_id": key, "kl": objective(schedule)}])
            return float(journal.answers[key]["kl"])

        yield value
