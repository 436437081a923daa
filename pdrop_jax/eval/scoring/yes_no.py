"""POPE and MME: yes/no questions."""

import os
import pathlib
from collections.abc import Sequence

from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import read_lines, value
from pdrop_jax.eval.scoring.files import ScoreReport, check_complete, mean, read_answers
from pdrop_jax.io import read_bytes
from pdrop_jax.paths import as_path

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
INSTRUCTIONS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")


def score_pope(answers: str | os.PathLike, questions: str | os.PathLike, annotations: str | os.PathLike) -> ScoreReport:
    """Scores POPE as ``llava.eval.eval_pope``, by category; the overall values are means over the categories.

    The n-th label of a category belongs to its n-th question, because POPE restarts its question ids in each category
    and LLaVA does not. A ratio with denominator 0 is 0.

    Args:
      questions: llava_pope_test.jsonl, with the category of each question.
      annotations: the folder of coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json.

    Raises:
      UserError: a file is malformed, or answers, questions and annotations do not belong to the same questions.
    """
    lines = read_answers(answers)
    found = {line.id: line.text for line in lines}
    asked: dict[str, list[tuple[str, str, str]]] = {}
    for number, line in read_lines(as_path(questions)):
        where = f"{questions} line {number}"
        question_id = str(value(line, "question_id", (str, int), where))
        question = (question_id, value(line, "text", str, where), where)
        asked.setdefault(value(line, "category", str, where), []).append(question)
    check_complete(answers, [line.id for line in lines], [name for part in asked.values() for name, _, _ in part])
    groups = {}
    for category, part in sorted(asked.items()):
        path = as_path(annotations) / f"coco_pope_{category}.json"
        labels = list(read_lines(path))
        if len(labels) != len(part):
            raise UserError(
                f"{path} has {len(labels)} labels for {len(part)} questions of that category in {questions}: use "
                "files of the same version of POPE"
            )
        truths = []
        for (number, label), (_, text, where) in zip(labels, part, strict=True):
            if not text.startswith(str(label.get("text", ""))):
                raise UserError(
                    f"{where} asks another question than {path} line {number}: use files of the same version of POPE"
                )
            truths.append(value(label, "label", str, f"{path} line {number}") != "no")
        groups[category] = _detection([says_yes(found[name]) for name, _, _ in part], truths)
    values = {name: mean([group[name] for group in groups.values()]) for name in ("accuracy", "f1")}
    return ScoreReport("pope", len(found), values, groups)


def says_yes(text: str) -> bool:
    """POPE's interpretation of an answer: yes, unless its first sentence has the word no, No or not."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _detection(said: Sequence[bool], truths: Sequence[bool]) -> dict[str, float]:
    pairs = list(zip(said, truths, strict=True))
    hits = pairs.count((True, True))
    precision, recall = _ratio(hits, sum(said)), _ratio(hits, sum(truths))
    return {
        "accuracy": mean([guess == truth for guess, truth in pairs]),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": mean(said),
        "answers": len(pairs),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def score_mme(answers: str | os.PathLike, annotations: str | os.PathLike) -> ScoreReport:
    """Scores MME as its ``calculation`` script does.

    The score of a task is 100 * (accuracy + share of images with both questions right). ``perception`` and
    ``cognition`` are sums over their 10 and 4 tasks.

    Args:
      answers: an answer file. Its question ids are task/image; the prompt distinguishes the questions about an image.
      annotations: the folder MME_Benchmark_release_version. The tasks that it contains are scored.

    Raises:
      UserError: a file is malformed, or answers and annotations are not of the same questions.
    """
    truths = _mme_truths(as_path(annotations))
    lines = read_answers(answers)
    found = {_mme_key(line.id, line.prompt): line.text for line in lines}
    check_complete(answers, [_mme_key(line.id, line.prompt) for line in lines], truths)
    right: dict[str, dict[str, list[bool]]] = {}
    for key, truth in truths.items():
        task, picture, _ = key
        right.setdefault(task, {}).setdefault(picture, []).append(mme_word(found[key]) == truth)
    groups = {}
    for task, pictures in right.items():
        acc = mean([each for both in pictures.values() for each in both])
        acc_plus = mean([all(both) for both in pictures.values()])
        groups[task] = {"score": 100 * (acc + acc_plus), "acc": acc, "acc_plus": acc_plus}
    sums = {
        name: sum(groups[task]["score"] for task in tasks if task in groups)
        for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return ScoreReport("mme", len(lines), sums, groups)


def mme_word(text: str) -> str:
    """MME's interpretation of an answer: "yes" or else "no" if its first four characters contain it, else "other"."""
    return next((word for word in ("yes", "no") if word in text.lower()[:4]), "other")


def _mme_truths(folder: pathlib.Path) -> dict[tuple[str, str, str], str]:
    truths = {}
    for task in (*PERCEPTION, *COGNITION):
        inner = folder / task / "questions_answers_YN"
        for path in sorted((inner if inner.is_dir() else folder / task).glob("*.txt")):
            for number, line in enumerate(read_bytes(path).decode(errors="replace").splitlines(), 1):
                question, tab, truth = line.strip().rpartition("\t")
                if not tab or truth.lower() not in ("yes", "no"):
                    raise UserError(f"{path} line {number} is malformed: expected a question, a tab, and Yes or No")
                truths[_mme_key(f"{task}/{path.stem}", question)] = truth.lower()
    if not truths:
        raise UserError(
            f"{folder} has no MME questions: expected MME_Benchmark_release_version, with folders existence, count, … "
            "of .txt files"
        )
    return truths


def _mme_key(name: str, question: str) -> tuple[str, str, str]:
    """Task, image and question, without the instructions that LLaVA and MME append to it in different ways."""
    for instruction in INSTRUCTIONS:
        question = question.replace(instruction, "")
    return name.split("/")[0], name.split("/")[-1].split(".")[0], " ".join(question.split())
