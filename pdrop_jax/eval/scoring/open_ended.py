"""TextVQA, VQAv2 and GQA: short open-ended answers."""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import value
from pdrop_jax.eval.scoring.files import ScoreReport, check_complete, mean, read_answers
from pdrop_jax.eval.scoring.normalise import VQA_COMMA, evalai, without_articles, without_punctuation
from pdrop_jax.io import read_json
from pdrop_jax.paths import as_path

ENOUGH = 3  # matching annotators for full accuracy


def soft_accuracy(answer: str, truths: Sequence[str]) -> float:
    """VQA accuracy of an answer, given the answers of several annotators.

    The mean of ``min(1, matches among the others / 3)`` with each annotator left out in turn. Among ten annotators, two
    matches give 0.6, three 0.9, four 1.
    """
    matches = sum(truth == answer for truth in truths)
    among = [matches - (truth == answer) for truth in truths]
    return mean([min(1.0, others / ENOUGH) for others in among])


def score_textvqa(answers: str | os.PathLike, annotations: str | os.PathLike) -> ScoreReport:
    """Scores TextVQA as ``llava.eval.eval_textvqa``: EvalAI normalisation of both sides, then ``soft_accuracy``.

    Args:
      answers: an answer file. Its question ids are image ids; the prompt distinguishes the questions about an image.
      annotations: TextVQA_0.5.1_val.json.

    Raises:
      UserError: a file is malformed, or answers and annotations are not of the same questions.
    """
    path = as_path(annotations)
    truths = {}
    wanted = []
    for number, item in enumerate(_records(read_json(path), "data", path), 1):
        where = f"{path} record {number}"
        question = value(item, "question", str, where).lower()
        key = (str(value(item, "image_id", (str, int), where)), question)
        truths[key] = [evalai(str(truth)) for truth in value(item, "answers", list, where)]
        wanted.append(key)
    found = read_answers(answers)
    keys = [(answer.id, textvqa_question(answer.prompt).lower()) for answer in found]
    check_complete(answers, keys, wanted)
    scores = [soft_accuracy(evalai(answer.text), truths[key]) for answer, key in zip(found, keys, strict=True)]
    return ScoreReport("textvqa", len(scores), {"accuracy": mean(scores)})


def textvqa_question(prompt: str) -> str:
    """The question in one of LLaVA's prompts, without OCR tokens and instructions.

    Prompts in which the public script finds no question, and stops, are read in the same spirit.
    """
    if prompt.startswith("OCR tokens: "):
        asked = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
        return asked[1] if asked else prompt
    lines = prompt.split("\n")
    return lines[1] if len(lines) > 2 and lines[0].startswith("Reference OCR token:") else lines[0]


def score_vqav2(answers: str | os.PathLike, annotations: str | os.PathLike) -> ScoreReport:
    """Scores VQAv2: answers as LLaVA submits them (EvalAI normalisation), scored by the official VQA evaluation.

    The evaluation normalises the true answers, and the submitted one again, only if the annotators disagree.

    Args:
      annotations: v2_mscoco_val2014_annotations.json.

    Raises:
      UserError: a file is malformed, or answers and annotations are not of the same questions.
    """
    path = as_path(annotations)
    records = {}
    for number, item in enumerate(_records(read_json(path), "annotations", path), 1):
        records[str(value(item, "question_id", (str, int), f"{path} record {number}"))] = item
    found = read_answers(answers)
    check_complete(answers, [answer.id for answer in found], records)
    scores: list[float] = []
    types: dict[str, list[float]] = {}
    for answer in found:
        where = f"{path} question {answer.id}"
        annotators = value(records[answer.id], "answers", list, where)
        truths = [_on_one_line(value(annotator, "answer", str, where)) for annotator in annotators]
        text = evalai(answer.text)
        if len(set(truths)) > 1:
            truths = [without_articles(without_punctuation(truth, comma=VQA_COMMA)) for truth in truths]
            text = without_articles(without_punctuation(text, comma=VQA_COMMA))
        scores.append(soft_accuracy(text, truths))
        types.setdefault(str(records[answer.id].get("answer_type", "other")), []).append(scores[-1])
    groups = {name: {"accuracy": mean(of_type), "answers": len(of_type)} for name, of_type in sorted(types.items())}
    return ScoreReport("vqav2", len(scores), {"accuracy": mean(scores)}, groups)


def score_gqa(answers: str | os.PathLike, annotations: str | os.PathLike) -> ScoreReport:
    """Scores GQA: exact-match accuracy over the balanced questions, in lower case without full stops at the end.

    Follows ``convert_gqa_for_eval`` and GQA's ``eval``: questions of structural type "query" are open, all others
    binary. Consistency, validity, plausibility and grounding need files that LLaVA's evaluation does not use.

    Args:
      annotations: testdev_balanced_questions.json.

    Raises:
      UserError: a file is malformed, or answers and annotations are not of the same questions.
    """
    path = as_path(annotations)
    questions = read_json(path)
    found = read_answers(answers)
    check_complete(answers, [answer.id for answer in found], questions)
    right: dict[str, list[float]] = {"binary": [], "open": []}
    for answer in found:
        question, where = questions[answer.id], f"{path} question {answer.id}"
        truth = value(question, "answer", str, where)
        balanced = question.get("isBalanced", True)
        if not isinstance(balanced, bool):
            raise UserError(f"{where}: 'isBalanced' is {json.dumps(balanced)[:60]}, expected true or false")
        if balanced:
            structure = value(question, "types", dict, where).get("structural")
            right["open" if structure == "query" else "binary"].append(answer.text.rstrip(".").lower() == truth)
    if not any(right.values()):
        raise UserError(
            f"{path} has no balanced question, and only those are scored: expected testdev_balanced_questions.json"
        )
    groups = {name: {"accuracy": mean(of_type), "answers": len(of_type)} for name, of_type in right.items()}
    return ScoreReport(
        "gqa", sum(map(len, right.values())), {"accuracy": mean([*right["binary"], *right["open"]])}, groups
    )


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _records(data: Mapping[str, Any], key: str, path: pathlib.Path) -> list[Mapping[str, Any]]:
    records = data.get(key)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} is malformed: expected an object with a list of records, {key!r}")
    return records
