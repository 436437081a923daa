"""Reading of answer files, checks that they are complete, and the report that all scores return."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import read_lines, value

MOST_NAMES = 3  # in an error message


@dataclasses.dataclass(frozen=True)
class ScoreReport:
    """The score of a benchmark.

    Attributes:
      answers: number of scored answers.
      values: named values over all answers. Shares are in 0..1; MME's sums are points.
      groups: the same for each category, task or answer type of the benchmark.
    """

    benchmark: str
    answers: int
    values: dict[str, float]
    groups: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A line of an answer file; ``where`` is its location, such as "file line 3"."""

    id: str
    text: str
    prompt: str
    where: str


def read_answers(path: str | os.PathLike) -> list[Answer]:
    """Reads an answer file in LLaVA's format, written by any program; the prompt is optional.

    Raises:
      UserError: the file cannot be read, a line is malformed, or there are no lines.
    """
    answers = []
    for number, line in read_lines(pathlib.Path(path)):
        where = f"{path} line {number}"
        answer_id, text = value(line, "question_id", (str, int), where), value(line, "text", str, where)
        answers.append(Answer(str(answer_id), text, value({"prompt": "", **line}, "prompt", str, where), where))
    if not answers:
        raise UserError(f"{path} holds no answers")
    return answers


def check_complete(path: str | os.PathLike, found: Iterable[Hashable], wanted: Iterable[Hashable]) -> None:
    """Raises UserError unless the answers ``found`` are exactly those ``wanted``, counting repetitions."""
    there, due = collections.Counter(iter(found)), collections.Counter(iter(wanted))
    wrong = [
        f"{what} {difference.total():,}: {_names(difference)}"
        for what, difference in (("lacks", due - there), ("has too many by", there - due))
        if difference
    ]
    if wrong:
        raise UserError(
            f"{path} has {there.total():,} answers to {due.total():,} questions and {' and '.join(wrong)}: score the "
            "answers to the questions of these annotations"
        )


def mean(numbers: Sequence[float]) -> float:
    """The mean, or 0 of an empty sequence."""
    return sum(numbers) / len(numbers) if numbers else 0.0


def _names(keys: Iterable[Any]) -> str:
    names = [" ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in keys]
    return ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
