"""Exact-match accuracy on the demo task: ``python -m examples.demo.evaluate MODEL``.

Every picture consists of test photos and gets one question of each kind as the first of a conversation. Place questions
at the end of a conversation, after the true answers to the earlier questions, are reported separately.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from examples.demo.grids import KINDS, SIDE, check_drawing, converse, draw_grid, first_question
from pdrop_jax.errors import exit_on_error
from pdrop_jax.generation.engine import generate_batch
from pdrop_jax.generation.pretrained import Model, load
from pdrop_jax.generation.result import Generation
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.chat_template import Turn as Exchange
from pdrop_jax.schedule import DropSchedule

BATCH = 100
LATER = "place, asked last"
NEW_TOKENS = 16  # four names and their commas are at most eleven


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Answers to one kind of question: ``right`` of ``asked`` match the expected text exactly."""

    kind: str
    asked: int
    right: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the share (Wilson, 1927)."""
        z, n, p = 1.959964, self.asked, self.share
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return centre - half, centre + half


@dataclasses.dataclass(frozen=True)
class Case:
    """One question for a model.

    Attributes:
      picture: (112, 112) uint8.
      turns: the conversation up to the question, whose own answer is None.
      answer: the expected answer.
    """

    kind: str
    picture: np.ndarray
    turns: list[Exchange]
    answer: str


def draw_cases(pictures: int, seed: int = 0) -> list[Case]:
    """Questions about ``pictures`` grids of test photos, sorted by kind."""
    check_drawing(pictures, seed)
    cases: dict[str, list[Case]] = {kind: [] for kind in (*KINDS, LATER)}
    for number in range(pictures):
        grid = draw_grid("test", seed, number)
        rng = np.random.default_rng([seed, number, 1])
        for kind in KINDS:
            turn = first_question(kind, grid.labels, rng)
            if turn:
                cases[kind].append(Case(kind, grid.picture, [(turn.question, None)], turn.answer))
        turns = converse(grid.labels, rng)
        if turns[-1].kind == "place":
            before: list[Exchange] = [(turn.question, turn.answer) for turn in turns[:-1]]
            cases[LATER].append(Case(LATER, grid.picture, [*before, (turns[-1].question, None)], turns[-1].answer))
    return [case for found in cases.values() for case in found]


def evaluate(
    model: Model | str | pathlib.Path, pictures: int = 1000, seed: int = 0, schedule: DropSchedule | None = None
) -> list[Accuracy]:
    """Asks the questions and counts the right answers.

    Args:
      model: a loaded model, or the folder of a checkpoint.
      schedule: for a model that is loaded here; None is the checkpoint's own.
    """
    model = model if isinstance(model, Model) else load(model, schedule)
    cases = draw_cases(pictures, seed)
    right = dict.fromkeys((case.kind for case in cases), 0)
    asked = dict(right)
    with tqdm(total=len(cases), desc="asking", unit=" questions", disable=None) as bar:
        for kind in asked:
            ours = [case for case in cases if case.kind == kind]
            for start in range(0, len(ours), BATCH):
                group = ours[start : start + BATCH]
                answers = answer(model, group)
                asked[kind] += len(group)
                right[kind] += sum(text == case.answer for text, case in zip(answers, group, strict=True))
                bar.update(len(group))
    return [Accuracy(kind, asked[kind], right[kind]) for kind in asked]


def answer(model: Model, cases: list[Case]) -> list[str]:
    """Greedy answers."""
    return _generate(model, cases).texts[: len(cases)]


def kept_of_place(model: Model, pictures: int = 300, seed: int = 0) -> list[float]:
    """Mean number of tokens of the cell in question that are left after each drop, over first place questions."""
    cases = [case for case in draw_cases(pictures, seed) if case.kind == "place"]
    side = math.isqrt(model.config.image_tokens)
    tokens = np.arange(side**2).reshape(side, side)
    counts = []
    for start in range(0, len(cases), BATCH):
        group = cases[start : start + BATCH]
        for case, stages in zip(group, _generate(model, group).kept, strict=False):
            row, column = (int(digit) - 1 for digit in re.findall(r"\d", case.turns[-1][0]))
            place = np.split(np.split(tokens, SIDE)[row], SIDE, axis=1)[column]
            counts.append([np.isin(place, kept).sum() for (kept,) in stages])
    return np.mean(counts, axis=0).tolist()


def _generate(model: Model, cases: list[Case]) -> Generation:
    """Pads a batch to BATCH rows, so that nothing is recompiled."""
    filled = [*cases, *[cases[-1]] * (BATCH - len(cases))]
    batch = model.processor(
        [case.turns for case in filled], [case.picture for case in filled], max_new_tokens=NEW_TOKENS
    )
    return generate_batch(model, batch, Sampling(NEW_TOKENS))


def table(models: Mapping[str, list[Accuracy]], above: Iterable[list[str]] = ()) -> str:
    """A Markdown table with one column per model and one row per kind of question, below the rows ``above``."""
    rows = [["", *models], ["---"] * (len(models) + 1), *above]
    for of_kind in zip(*models.values(), strict=True):
        cells = [f"{100 * x.share:.1f} % ({100 * x.interval[0]:.1f} to {100 * x.interval[1]:.1f})" for x in of_kind]
        rows.append([f"{of_kind[0].kind}, {of_kind[0].asked:,} asked", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run(
    model: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="MODEL")],
    pictures: int = 1000,
    seed: int = 0,
    dense: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Print the exact-match accuracy on test pictures and how many tokens of the cell in question each drop leaves.

    Args:
      model: Folder of the checkpoint.
      pictures: Number of pictures.
      seed: RNG seed for the pictures and questions.
      dense: Drop nothing, regardless of the checkpoint's schedule.
    """
    loaded = load(model, DropSchedule.none() if dense else None)
    print(table({"right, with its 95 % interval": evaluate(loaded, pictures, seed)}))
    if loaded.config.schedule.layers:
        left = ", ".join(f"{mean:.1f}" for mean in kept_of_place(loaded, pictures, seed))
        print(f"\ntokens left of the place asked for, by stage: {left} of {loaded.config.image_tokens // SIDE**2}")


if __name__ == "__main__":
    with exit_on_error():
        tyro.cli(run, prog="python -m examples.demo.evaluate")
