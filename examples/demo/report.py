"""A table that compares runs of the demo: ``python -m examples.demo.report RUN …``."""

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
from pdrop_jax.train.log_file import FILE, read_line
from pdrop_jax.train.result import model_of

NUMBERS = ("loss", "seconds", "macs")  # keys in the line of a step


@dataclasses.dataclass(frozen=True)
class RunCost:
    """What a run cost.

    Attributes:
      seconds: median time of a step.
      hours: of all steps, including compilation and saving.
      gmacs: per step.
    """

    steps: int
    seconds: float
    hours: float
    gmacs: float


def cost_of(run: pathlib.Path) -> RunCost:
    """The cost of a run that logged every step, from its log.

    Raises:
      UserError: the log is missing or empty.
    """
    try:
        lines = [read_line(raw) for raw in read_bytes(run / FILE).splitlines()]
    except UserError as error:
        raise UserError(f"{run} is not the folder of a run: {error}") from None
    if damaged := lines.count(None):
        print(f"warning: {damaged} damaged lines of {printable(run / FILE)} are ignored", file=sys.stderr)
    steps = [line for line in lines if line and all(isinstance(line.get(key), int | float) for key in NUMBERS)]
    if not steps:
        raise UserError(f"{run / FILE} contains no steps: train first")
    seconds = [line["seconds"] for line in steps]
    return RunCost(len(steps), statistics.median(seconds), sum(seconds) / 3600, steps[-1]["macs"] / 1e9)


def rows_of(costs: Sequence[RunCost]) -> list[list[str]]:
    """One row per kind of cost, one cell per run."""
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
    """Print the cost of runs of the demo and the exact-match accuracy of their models on test pictures.

    Args:
      runs: Folders of the runs.
      pictures: Number of pictures.
      seed: RNG seed for the pictures and questions.
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
