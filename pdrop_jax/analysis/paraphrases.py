"""Questions in other words, of a wanted edit size: from templates, or from a user's file.

"Compared to What?" (arXiv 2605.01048) lets a language model paraphrase each text until the edit size is within 0.5
points of the wanted one. Here candidates come from templates or a file, and the choice among them is the paper's.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Sequence

from pdrop_jax.analysis.metrics import edit_size
from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import Question, parse, value
from pdrop_jax.inputs.chat_template import IMAGE_TAG, without_tags
from pdrop_jax.io import read_bytes
from pdrop_jax.paths import as_path

Encode = Callable[[list[str]], list[list[int]]]  # texts -> token ids
TOLERANCE = 0.5  # percentage points
OPENINGS = (  # sentences in front of a question, any of them in this order
    "Hello.",
    "Look at this picture.",
    "I have a question about what you can see in it.",
    "Take your time and look at all of its parts carefully.",
    "Please answer briefly.",
)
CLOSINGS = ("", " Please.", " Thank you.", " Thank you very much in advance.")
SYNONYMS = (  # each is replaced where it occurs, alone or with the others
    ("What is", "What's"),
    ("How many", "What number of"),
    ("Is there", "Can you see"),
    ("Are there", "Do you see"),
    ("Which", "What"),
    (" in the ", " within the "),
    ("picture", "photo"),
    ("image", "picture"),
)
LEADING_TAGS = re.compile(rf"(?:\s*{IMAGE_TAG}\s*)*")
MOST_SYNONYMS = 2  # of these are used together, so that a question has at most some hundred candidates


@dataclasses.dataclass(frozen=True)
class Rewording:
    """A question in other words and its edit size in percent of the question's tokens."""

    text: str
    size: float


def templates(text: str) -> list[str]:
    """The question ``text`` in some hundred other forms; ``<image>`` tags and further lines stay as they are."""
    start = LEADING_TAGS.match(text)[0]  # type: ignore[index]  # it matches nothing too
    question, line, more = text[len(start) :].partition("\n")
    used = [pair for pair in SYNONYMS if pair[0] in question][:MOST_SYNONYMS]
    bodies = []
    for pairs in itertools.chain.from_iterable(itertools.combinations(used, k) for k in range(len(used) + 1)):
        body = question
        for old, new in pairs:
            body = body.replace(old, new)
        bodies.append(body)
    openings = itertools.chain.from_iterable(itertools.combinations(OPENINGS, k) for k in range(len(OPENINGS) + 1))
    found = [
        f"{start}{' '.join([*opening, body])}{closing}{line}{more}"
        for opening, body, closing in itertools.product(openings, bodies, CLOSINGS)
    ]
    return list(dict.fromkeys(other for other in found if other != text))


def read_paraphrases(path: str | os.PathLike, questions: Sequence[Question]) -> dict[str, list[str]]:
    """The paraphrases of a file, by ``str`` of a question's id: lines ``{"question_id", "text"}``, any number for each.

    Raises:
      UserError: a line is empty or malformed, its text is empty or the question itself, its id is that of no question,
        or a question has no paraphrase.
    """
    known = {str(question.id): question for question in questions}
    if len(known) < len(questions):
        raise UserError(f"{path} names questions by their ids, but the file of questions repeats some of them")
    found: dict[str, list[str]] = {name: [] for name in known}
    for number, line in enumerate(read_bytes(as_path(path)).rstrip(b"\n").split(b"\n"), 1):
        where = f"{path} line {number}"
        if not line.strip():
            raise UserError(f"{where} is empty: remove it")
        record = parse(line, where)
        name, text = str(value(record, "question_id", (str, int), where)), value(record, "text", str, where)
        if name not in known:
            raise UserError(f"{where}: question_id {name!r} is not in the file of questions")
        if not text.strip() or text == known[name].text:
            raise UserError(f"{where}: the text of {name!r} is {'the question itself' if text.strip() else 'empty'}")
        if text.count(IMAGE_TAG) != known[name].text.count(IMAGE_TAG):
            raise UserError(
                f"{where}: the text of {name!r} has {text.count(IMAGE_TAG)} <image> tags, the question has "
                f"{known[name].text.count(IMAGE_TAG)}"
            )
        found[name].append(text)
    missing = [name for name, texts in found.items() if not texts]
    if missing:
        raise UserError(f"{path} has no paraphrase of {len(missing)} of {len(found)} questions, such as {missing[0]!r}")
    return found


def rewordings(question: Question, candidates: Sequence[str], encode: Encode) -> list[Rewording]:
    """``candidates`` for a question with their edit sizes.

    Raises:
      UserError: the question has no tokens.
    """
    own, *others = encode([without_tags(text) for text in (question.text, *candidates)])
    if not len(own):
        raise UserError(f"question {question.id!r} has no tokens, so it has no edit size")
    return [Rewording(text, edit_size(own, ids)) for text, ids in zip(candidates, others, strict=True)]


def closest(found: Sequence[Rewording], size: float) -> Rewording:
    """The rewording nearest to ``size``; as in the paper, a larger one only if there is no smaller one.

    One within ``TOLERANCE`` is taken in any case.
    """
    nearest = min(found, key=lambda each: abs(each.size - size))
    below = [each for each in found if each.size <= size]
    if abs(nearest.size - size) <= TOLERANCE or not below:
        return nearest
    return max(below, key=lambda each: each.size)


def matched(
    questions: Sequence[Question], candidates: Sequence[Sequence[str]], sizes: Sequence[float], encode: Encode
) -> list[list[Rewording]]:
    """[size][question] -> the rewording closest to it of the question's ``candidates``."""
    found = [rewordings(*pair, encode) for pair in zip(questions, candidates, strict=True)]
    return [[closest(each, size) for each in found] for size in sizes]
