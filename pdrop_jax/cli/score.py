"""``pdrop score``: score a file of answers as the benchmark does."""

import dataclasses
import json
import pathlib

import tyro

from pdrop_jax.cli.options import File, Json
from pdrop_jax.errors import UserError, printable
from pdrop_jax.eval.benchmarks import Benchmark


def run(
    benchmark: tyro.conf.Positional[Benchmark],
    answers: pathlib.Path,
    annotations: pathlib.Path,
    questions: File = None,
    split: str = "test",
    json_output: Json = False,
) -> None:
    """Score an answer file of pdrop eval, or of LLaVA's own scripts, by the rules of the benchmark's public script.

    Args:
      benchmark: Benchmark name.
      answers: Answer file: JSON lines with question_id, prompt and text.
      annotations: The benchmark's annotation file; for pope, scienceqa and mme its folder. See docs/evaluation.md.
      questions: For pope: the question file with the category of each question.
      split: For scienceqa: the split.
    """
    if (benchmark == "pope") != (questions is not None):
        raise UserError("pope needs --questions FILE, and no other benchmark takes it")

    from pdrop_jax.eval.scoring import score

    report = score(benchmark, answers, annotations, questions=questions, split=split)
    if json_output:
        print(json.dumps(dataclasses.asdict(report)))
        return
    for name, values in (("all", {**report.values, "answers": report.answers}), *report.groups.items()):
        print(f"{printable(name):24}{'   '.join(f'{key} {_shown(key, number)}' for key, number in values.items())}")


def _shown(key: str, number: float) -> str:
    if key == "answers":
        return f"{number:,}"
    return f"{number:.2f}" if key in ("score", "perception", "cognition") else f"{100 * number:.2f} %"
