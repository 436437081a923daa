"""ScienceQA: one letter of several."""

import os
import pathlib
import re

from pdrop_jax.eval.questions import value
from pdrop_jax.eval.scoring.files import ScoreReport, check_complete, mean, read_answers
from pdrop_jax.inputs.chat_template import IMAGE_TAG
from pdrop_jax.io import read_json

LETTERS = "ABCDE"


def score_scienceqa(answers: str | os.PathLike, annotations: str | os.PathLike, split: str = "test") -> ScoreReport:
    """ScienceQA as ``llava.eval.eval_science_qa``; ``image_accuracy`` is that of the prompts with an image tag.

    Args:
      annotations: the folder of problems.json and pid_splits.json.
      split: of the latter.

    Raises:
      UserError: a file is malformed, there is no such split, or answers and annotations are not of the same questions.
    """
    folder = pathlib.Path(annotations)
    problems, splits = read_json(folder / "problems.json"), folder / "pid_splits.json"
    found = read_answers(answers)
    wanted = value(read_json(splits), split, list, str(splits))
    check_complete(answers, [answer.id for answer in found], map(str, wanted))
    right, with_image = [], []
    for answer in found:
        where = f"{folder / 'problems.json'} problem {answer.id}"
        problem = value(problems, answer.id, dict, where)
        truth, choices = value(problem, "answer", int, where), value(problem, "choices", list, where)
        letter = chosen_letter(answer.text)
        right.append(letter is not None and LETTERS.index(letter) == truth < len(choices))
        if IMAGE_TAG in answer.prompt:
            with_image.append(right[-1])
    values = {"accuracy": mean(right), "image_accuracy": mean(with_image)}
    return ScoreReport("scienceqa", len(right), values, {"with image": {"answers": len(with_image)}})


def chosen_letter(text: str) -> str | None:
    """The letter that an answer names: alone, in front as "B. ", or in "The answer is B." or "The answer is B"."""
    text = text.replace("\n", ". ")
    if len(text.strip()) == 1 and text.strip() in LETTERS:
        return text.strip()
    if found := re.match(rf"([{LETTERS}])\. ", text):
        return found[1]
    named = re.search(rf"The answer is ([{LETTERS}])\.", text) or re.search(rf"The answer is ([{LETTERS}])", text)
    return named[1] if named else None
