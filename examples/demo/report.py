"""Runs of the demo side by side, as a table: ``python -m examples.demo.report RUN …``."""

import dataclasses
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Annotated

import tyro

from examples.demo.evaluate import evaluate, table
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError, exit_on_error, printable
from pdrop_jax.io import read_bytes
from pdrop_jax.train.progress import FILE, read_line
from pdrop_jax.train.result import model_of

NUMBERS = ("loss", "seconds", "macs")  # of a step's line


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run took.

    Attributes:
      seconds: of a step, median.
      hours: of all steps together, compilation and saving included.
      gmacs: of a step.
    """

    steps: int
    seconds: float
    hours: float
    gmacs: float


def cost_of(run: pathlib.Path) -> Cost:
    """From the log of a run that logged every step.

    Raises:
      UserError: it has no log, or an empty one.
    """
    try:
        lines = [read_line(raw) for raw in read_bytes(run / FILE).splitlines()]
    except UserError as error:
        raise UserError(f"{run} is no run: {error}") from None
    if damaged := lines.count(None):
        print(f"warning: {damaged} damaged lines of {printable(run / FILE)} are left out", file=sys.stderr)
    steps = [line for line in lines if line and all(isinstance(line.get(key), int | float) for key in NUMBERS)]
    if not steps:
        raise UserError(f"{run / FILE} has no step in it: train first")
    seconds = [line["seconds"] for line in steps]
    return Cost(len(steps), statistics.median(seconds), sum(seconds) / 3600, steps[-1]["macs"] / 1e9)


def rows_of(costs: Sequence[Cost]) -> list[list[str]]:
    """A row for each thing that runs cost, a cell for each run."""
    return [
        ["GMACs a step", *(f"{cost.gmacs:.1f}" for cost in costs)],
        ["seconds a step", *(f"{cost.seconds:.2f}" for cost in costs)],
        ["hours in all", *(f"{cost.hours:.2f}, {cost.steps:,} steps" for cost in costs)],
    ]


def run(
    runs: Annotated[tyro.conf.Positional[tuple[pathlib.Path, ...]], tyro.conf.arg(metavar="RUN")],
    pictures: int = 1000,
    seed: int = 0,
) -> None:
    """Print what runs of the demo took and how many questions about test pictures their models answer exactly.

    Args:
      runs: their folders.
      pictures: how many.
      seed: of the pictures and questions.
    """
    costs, scores = [], {}
    for folder in runs:
        costs.append(cost_of(folder))
        with tempfile.TemporaryDirectory() as scratch:
            model = model_of(folder, pathlib.Path(scratch))
            drops = LlavaConfig.load(model).schedule.layers
            name = f"drops after {', '.join(map(str, drops))}" if drops else "dense"
            scores[name] = evaluate(model, pictures, seed)
    print(table(scores, above=rows_of(costs)))


if __name__ == "__main__":
    with exit_on_error():
        tyro.cli(run, prog="python -m examples.demo.report")
