"""ScienceQA: multiple choice, answered with a letter."""

import os
import re

from pdrop_jax.eval.questions import value
from pdrop_jax.eval.scoring.files import ScoreReport, check_complete, mean, read_answers
from pdrop_jax.inputs.chat_template import IMAGE_TAG
from pdrop_jax.io import read_json
from pdrop_jax.paths import as_path

LETTERS = "ABCDE"


def score_scienceqa(answers: str | os.PathLike, annotations: str | os.PathLike, split: str = "test") -> ScoreReport:
    """Scores ScienceQA as ``llava.eval.eval_science_qa``; ``image_accuracy`` covers the prompts with an image tag.

    Args:
      annotations: the folder that holds problems.json and pid_splits.json.
      split: a key of pid_splits.json.

    Raises:
      UserError: a file is malformed, the split does not exist, or answers are missing, unexpected or duplicated.
    """
    folder = as_path(annotations)
    problems, splits = read_json(folder / "problems.json"), folder / "pid_splits.json"
    found = read_answers(answers)
    wanted = value(read_json(splits), split, list, str(splits))
    check_complete(answers, [answer.id for answer in found], map(str, wanted))
    right, with_image = [], []
    for answer in found:
        where = f"{folder / 'problems.json'} problem {answer.id}"
        problem = value(problems, answer.id, dict, where)
        truth, choices = value(problem, "answer", int, where), value(problem, "choices", list, where)
        right.append(0 <= truth < min(len(choices), len(LETTERS)) and chosen_letter(answer.text) == LETTERS[truth])
        if IMAGE_TAG in answer.prompt:
            with_image.append(right[-1])
    values = {"accuracy": mean(right), "image_accuracy": mean(with_image)}
    return ScoreReport("scienceqa", len(right), values, {"with image": {"answers": len(with_image)}})


def chosen_letter(text: str) -> str | None:
    """The letter that an answer names, by the rules of the public script; None if it names none.

    An answer is a letter alone ("B"), starts with a letter, a full stop and a space ("B. because"), or says "The answer
    is B." exactly once, with any character but a line break in place of the full stop. White space is not stripped.
    Only the last rule finds letters beyond E.
    """
    if text[:1] in tuple(LETTERS) and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    named = re.findall(r"The answer is ([A-Z]).", text)
    return named[0] if len(named) == 1 else None
