"""``pdrop score``: score a file of answers as the benchmark does."""

import dataclasses
import json
import pathlib
from typing import Annotated, Literal

import tyro

from pdrop_jax.errors import UserError, printable


def run(
    benchmark: tyro.conf.Positional[Literal["pope", "textvqa", "gqa", "vqav2", "scienceqa", "mme"]],
    answers: pathlib.Path,
    annotations: pathlib.Path,
    questions: pathlib.Path | None = None,
    split: str = "test",
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Print the score of an answer file, of pdrop eval or LLaVA's own scripts.

    Args:
      benchmark: which one.
      answers: JSON lines with question_id, prompt and text.
      annotations: the benchmark's own file, or its folder for pope, scienceqa and mme; see docs/evaluation.md.
      questions: for pope, the question file with the categories.
      split: for scienceqa.
      json_output: print one JSON object instead of a table.
    """
    if (benchmark == "pope") != (questions is not None):
        raise UserError("--questions FILE belongs to pope, which needs it, and to no other benchmark")

    from pdrop_jax.eval import scoring

    if questions is not None:
        score = scoring.score_pope(answers, questions, annotations)
    elif benchmark == "scienceqa":
        score = scoring.score_scienceqa(answers, annotations, split)
    else:
        score = getattr(scoring, f"score_{benchmark}")(answers, annotations)
    if json_output:
        print(json.dumps(dataclasses.asdict(score)))
        return
    for name, values in (("all", {**score.values, "answers": score.answers}), *score.groups.items()):
        print(f"{printable(name):24}{'   '.join(f'{key} {_shown(key, number)}' for key, number in values.items())}")


def _shown(key: str, number: float) -> str:
    if key == "answers":
        return f"{number:,}"
    return f"{number:.2f}" if key in ("score", "perception", "cognition") else f"{100 * number:.2f} %"
