"""Coordinate search for a schedule: the smallest KL to the dense float model within a budget.

A schedule of m drops is m layers and the shares of the drops among them; what is left at the end follows from the
budget, as in ``allocation``. One coordinate at a time is changed, a layer by one or a share by half or twice, and the
best change is kept, until none helps. Every candidate compiles a program, so decoders of many layers take long; layers
in front of the first drop do not run again.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pdrop_jax.analysis.budget import Budget
from pdrop_jax.analysis.metrics import kl
from pdrop_jax.analysis.tune.allocation import BudgetTooSmall, allocate
from pdrop_jax.analysis.tune.calibrate import Sample
from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import ROUNDED, on_devices, rows_on_devices
from pdrop_jax.generation.pretrained import Model, reschedule
from pdrop_jax.model.attention import aligned
from pdrop_jax.model.decoder import run_stages
from pdrop_jax.model.drop import TokenBuffer
from pdrop_jax.model.params import Params
from pdrop_jax.model.scores import find_score
from pdrop_jax.model.vlm import embed, next_logits, prefill
from pdrop_jax.schedule import DropSchedule

FACTORS = (0.5, 2.0)  # that a share is changed by


@dataclasses.dataclass(frozen=True)
class Point:
    """Where the search stands: drop layers, and the share of the drops that each makes."""

    layers: tuple[int, ...]
    shares: tuple[float, ...]


class Objective:
    """The mean KL of samples' first new token, dense float model || a schedule on the deployed model.

    Args:
      exact, quantized: see ``calibrate``.
      score: as the schedules of the search name it, with its weights.

    Raises:
      UserError: the score needs what is not computed for a candidate.
    """

    def __init__(self, exact: Model, quantized: Model, samples: Sequence[Sample], score: DropSchedule) -> None:
        none = dataclasses.replace(score, layers=(), ratios=())
        if find_score(dataclasses.replace(quantized.config, schedule=none)).last_layer:
            raise UserError(f"score {score.score!r} cannot be searched with: it needs the layer before a drop")
        self.model = quantized
        dense, start = reschedule(exact, DropSchedule.none()), reschedule(quantized, none)
        self._expected: list[np.ndarray] = []
        self._starts: list[tuple[TokenBuffer, np.ndarray, Sample]] = []
        for sample in tqdm(samples, "without drops", unit=" batches", disable=None):
            with on_devices(exact):
                batch = rows_on_devices(exact, sample.batch)
                logits, _, _ = _prefill(dense.config, dense.params, batch, 0)
                buffer, inputs = jax.device_get(_start(start.config, start.params, batch))
            self._expected.append(np.asarray(jax.nn.softmax(logits))[: sample.rows])
            self._starts.append((buffer, inputs, sample))

    def __call__(self, schedule: DropSchedule) -> float:
        model = reschedule(self.model, schedule)
        first = schedule.layers[0]
        found = []
        for expected, (buffer, inputs, sample) in zip(self._expected, self._starts, strict=True):
            left = None if first >= model.config.additions else buffer.additions
            at = dataclasses.replace(buffer, hidden=inputs[first], additions=left)
            with on_devices(model):
                logits = _finish(model.config, model.params, at, sample.batch.bucket)
            found.append(kl(expected, np.asarray(jax.nn.softmax(logits))[: sample.rows]))
        return float(np.concatenate(found).mean())


_prefill = jax.jit(prefill, static_argnums=(0, 3), compiler_options=ROUNDED)


@functools.partial(jax.jit, static_argnums=0, compiler_options=ROUNDED)
def _start(config: LlavaConfig, params: Params, batch: Batch) -> tuple[TokenBuffer, jax.Array]:
    """The first layer's buffer, and the input of each layer (L, B, S, D)."""
    plan = config.schedule.plan(config.text.num_layers, batch.bucket, aligned("auto"))
    buffer = embed(config, params, batch, plan[0].slots)
    out = run_stages(config, params["stages"], plan, buffer, batch.bucket.images, keep_hidden=True)
    (inputs,) = out.layer_inputs
    assert inputs is not None
    return buffer, inputs


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=ROUNDED)
def _finish(config: LlavaConfig, params: Params, buffer: TokenBuffer, bucket: Any) -> jax.Array:
    """Logits (B, V) from the buffer in front of the first drop."""
    plan = config.schedule.plan(config.text.num_layers, bucket, aligned("auto"))
    out = run_stages(config, params["stages"], plan, buffer, bucket.images, first=1)
    return next_logits(config, params, out.buffer)


def neighbours(point: Point, first: int, stop: int) -> Iterator[list[Point]]:
    """The changes of each coordinate in turn, those that keep layers ascending within first … stop - 1."""
    for n in range(len(point.layers)):
        moved = []
        for step in (-1, 1):
            layers = (*point.layers[:n], point.layers[n] + step, *point.layers[n + 1 :])
            if first <= layers[0] and layers[-1] < stop and all(a < b for a, b in itertools.pairwise(layers)):
                moved.append(Point(layers, point.shares))
        yield moved
        if len(point.layers) > 1:
            changed = [
                [share * (factor if m == n else 1) for m, share in enumerate(point.shares)] for factor in FACTORS
            ]
            yield [Point(point.layers, tuple(share / sum(shares) for share in shares)) for shares in changed]


def search(
    text: TextConfig,
    start: Point,
    score: DropSchedule,
    budget: Budget,
    image_tokens: int,
    objective: Callable[[DropSchedule], float],
    *,
    first: int = 1,
    rounds: int = 2,
) -> tuple[DropSchedule, float]:
    """The best schedule found and its objective. Deterministic: a repeated search asks for the same candidates.

    Args:
      start: must meet the budget; candidates that cannot are passed over.
      score: the schedules' other fields.
      objective: of a schedule; called once for each.
      first: the earliest drop layer.
      rounds: passes over all coordinates at most.

    Raises:
      BudgetTooSmall: ``start`` cannot meet the budget.
    """

    def schedule_at(point: Point) -> DropSchedule:
        layers = dataclasses.replace(score, layers=point.layers, ratios=(0.0,) * len(point.layers))
        return allocate(text, layers, point.shares, budget, image_tokens)

    known: dict[DropSchedule, float] = {}
    with tqdm(desc="searching", unit=" schedules", disable=None) as bar:

        def value(point: Point) -> float:
            schedule = schedule_at(point)
            if schedule not in known:
                known[schedule] = objective(schedule)
                bar.update()
                bar.set_postfix_str(f"KL {min(known.values()):.3g}")
            return known[schedule]

        point, best = start, value(start)
        for _ in range(rounds):
            before = point
            coordinates = len(list(neighbours(point, first, text.num_layers)))
            for n in range(coordinates):
                for candidate in list(neighbours(point, first, text.num_layers))[n]:
                    try:
                        found = value(candidate)
                    except BudgetTooSmall:
                        continue
                    if found < best:
                        point, best = candidate, found
            if point == before:
                break
    return schedule_at(point), best
