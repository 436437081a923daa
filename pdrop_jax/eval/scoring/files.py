"""Answer files, the check that every question is answered exactly once, and the report of a score."""

import collections
import dataclasses
import os
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import read_lines, value
from pdrop_jax.paths import as_path

MOST_NAMES = 3  # ids listed in an error message


@dataclasses.dataclass(frozen=True)
class ScoreReport:
    """A benchmark's result.

    Attributes:
      answers: number of scored answers.
      values: metrics over all answers. Accuracies and ratios are in 0..1; MME's sums are points.
      groups: metrics of each part of the benchmark: a category, task or answer type.
    """

    benchmark: str
    answers: int
    values: dict[str, float]
    groups: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ScoredAnswer:
    """A line of an answer file; ``where`` locates it for error messages, e.g. "a.jsonl line 3"."""

    id: str
    text: str
    prompt: str
    where: str


def read_answers(path: str | os.PathLike) -> list[ScoredAnswer]:
    """Reads an answer file in LLaVA's format, whichever program wrote it. A missing prompt is read as "".

    Raises:
      UserError: the file cannot be read, a line is malformed, or there are no answers.
    """
    answers = []
    for number, line in read_lines(as_path(path)):
        where = f"{path} line {number}"
        answer_id, text = value(line, "question_id", (str, int), where), value(line, "text", str, where)
        answers.append(ScoredAnswer(str(answer_id), text, value({"prompt": "", **line}, "prompt", str, where), where))
    if not answers:
        raise UserError(f"{path} has no answers: expected JSON lines with question_id, prompt and text")
    return answers


def check_complete(path: str | os.PathLike, found: Iterable[Hashable], wanted: Iterable[Hashable]) -> None:
    """Raises UserError unless ``found`` has exactly the keys in ``wanted``, each equally often."""
    there, due = collections.Counter(iter(found)), collections.Counter(iter(wanted))
    wrong = [
        f"{difference.total():,} {what}: {_names(difference)}"
        for what, difference in (("missing", due - there), ("unexpected or duplicated", there - due))
        if difference
    ]
    if wrong:
        raise UserError(
            f"{path} has {there.total():,} answers for {due.total():,} questions ({'; '.join(wrong)}): pass the "
            "annotations that belong to these answers"
        )


def mean(numbers: Sequence[float]) -> float:
    """The mean; 0 of an empty sequence."""
    return sum(numbers) / len(numbers) if numbers else 0.0


def _names(keys: Iterable[Any]) -> str:
    names = [" ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in keys]
    return ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
