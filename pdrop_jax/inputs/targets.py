"""Training rows: the messages of a LLaVA conversation -> token ids, and which of them are targets.

Ids and targets equal those of LLaVA's preprocess_v1, preprocess_llama_2, preprocess_mpt and preprocess_plain with a
LLaMA tokenizer, with either setting of ``legacy`` (tests/golden, preprocess_masks). LLaVA's code finds the answers by
tokenizing each round of a conversation separately and adding up lengths; here the conversation is tokenized once and
the answers are found by character offsets. If the lengths do not add up ("tokenization mismatch"), LLaVA's code masks
the whole conversation, and so does this module; see ``training_text`` and ``tokenize``.

One difference remains, for conversations longer than the tokenizer's model_max_length: there LLaVA's code uses lengths
that do not add up.
"""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pdrop_jax.batch import IGNORE
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.chat_template import (
    IMAGE_PLACEHOLDER,
    IMAGE_TAG,
    Turn,
    as_sentencepiece,
    join_chunks,
    render,
    render_turns,
    surplus_bos,
    template_named,
    without_tags,
    write_captions,
)

ROLES = ("human", "gpt")  # of questions and of answers


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """A rendered conversation.

    Attributes:
      text: with an ``<image>`` tag for each image.
      spans: (start, stop) character offsets of the targets: each answer with its end marker.
    """

    text: str
    spans: Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Example:
    """A training row.

    Attributes:
      ids: (n,) int32; IMAGE_PLACEHOLDER stands for a whole image.
      labels: (n,) int32, the id itself at each target, IGNORE elsewhere.
    """

    ids: np.ndarray
    labels: np.ndarray


def with_captions(text: TrainingText, captions: Sequence[Sequence[str]], place: str) -> TrainingText:
    """``text`` after ``chat_template.write_captions``; its spans move along."""
    if not any(captions):
        return text
    grown = [
        (found.end(), len(write_captions(found[0], [texts], place)) - len(found[0]))
        for found, texts in zip(re.finditer(place, text.text), captions, strict=True)
    ]

    def moved(offset: int) -> int:
        return offset + sum(more for end, more in grown if end <= offset)

    spans = [(moved(start), moved(stop)) for start, stop in text.spans]
    return TrainingText(write_captions(text.text, captions, place), spans)


def turns_of(messages: Any, several: bool = False) -> list[Turn]:
    """Questions and answers of ``[{"from": "human" | "gpt", "value": text}, …]``, with tags where LLaVA puts them.

    An answer before the first question is skipped. The image tag moves to the start of its message, on its own line.

    Args:
      several: whether the conversation has more than one image. Then a message with several tags is unchanged.

    Raises:
      UserError: the messages have another form, or questions and answers do not alternate.
    """
    if not isinstance(messages, list):
        raise UserError(f"conversations is a {type(messages).__name__}, expected a list of messages")
    texts: list[str] = []
    for number, message in enumerate(messages, 1):
        role, value = (message.get("from"), message.get("value")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(value, str):
            raise UserError(f"message {number} is not of the form {{from: human or gpt, value: text}}")
        if number == 1 and role == "gpt":
            continue
        if role != ROLES[len(texts) % 2]:
            raise UserError(f"message {number} is from {role!r}, expected {ROLES[len(texts) % 2]!r}")
        texts.append(value if several and value.count(IMAGE_TAG) > 1 else _tag_first(value))
    if not texts:
        raise UserError("the conversation has no question")
    answers: list[str | None] = [*texts[1::2]]
    return list(zip(texts[::2], [*answers, None] if len(texts) % 2 else answers, strict=True))


def _tag_first(text: str) -> str:
    # LLaVA's code keeps one tag, however many there are: its records have one image.
    return f"{IMAGE_TAG}\n{without_tags(text).strip()}".strip() if IMAGE_TAG in text else text


def training_text(turns: Sequence[Turn], template: str) -> TrainingText:
    """The text of a conversation and the spans of its answers.

    "plain" omits the question: the image is followed by its caption. With any other template, a conversation has no
    spans if a message is empty, a question has no answer, or a message contains the template's own markers (``</s>``,
    `` ASSISTANT: ``), because the lengths in LLaVA's code do not add up for it.

    Raises:
      UserError: the template is unknown, or it is "plain" and the conversation is not one question with one tag and
        one answer.
    """
    parts = template_named(template)
    if template == "plain":
        (question, answer), *more = turns
        if more or answer is None or question.count(IMAGE_TAG) != 1:
            raise UserError("template 'plain' takes one question with one <image> tag and one answer")
        text = IMAGE_TAG + answer + parts.answered
        return TrainingText(text, [(len(IMAGE_TAG), len(text))])
    pieces = render_turns(turns, template)
    text = "".join(asked + answered for asked, answered in pieces)
    blank = render([("", "")] * len(turns), template)
    marks = [mark for mark in (parts.answered.strip(), parts.asked + parts.answer) if mark.strip()]
    if not all(question and answer for question, answer in turns) or any(
        text.count(m) != blank.count(m) for m in marks
    ):
        return TrainingText(text, [])
    ends = list(itertools.accumulate(len(piece) for pair in pieces for piece in pair))
    return TrainingText(text, list(zip(ends[::2], ends[1::2], strict=True)))


def ends_answers(tokenizer: Any, template: str) -> bool:
    """Whether ``tokenizer`` has the template's end marker as one token; if not, nothing is learned."""
    mark = template_named(template).end_token
    return mark is None or tokenizer.backend_tokenizer.token_to_id(mark) is not None


def tokenize(tokenizer: Any, texts: Sequence[TrainingText], template: str) -> list[Example]:
    """``tokenize_chunks``, without any targets if ``ends_answers`` is false.

    So it is in LLaVA's code for "chatml_direct" with a LLaMA tokenizer.
    """
    if not ends_answers(tokenizer, template):
        texts = [TrainingText(text.text, []) for text in texts]
    return tokenize_chunks(tokenizer, texts)


def tokenize_chunks(tokenizer: Any, texts: Sequence[TrainingText]) -> list[Example]:
    """Ids and labels of ``texts``, from one call of the tokenizer for the chunks between their images.

    A token is a target if its last character is in a span. An image never is, even inside an answer.

    Args:
      tokenizer: a fast tokenizer of transformers.
    """
    chunks = [chunk for text in texts for chunk in text.text.split(IMAGE_TAG)]
    given = [as_sentencepiece(tokenizer, chunk) for chunk in chunks]
    encoded = zip(chunks, given, tokenizer(given, verbose=False).encodings if given else (), strict=True)
    examples = []
    for text in texts:
        ids, labels, start = [], [], 0  # start: character offset of the chunk in the text
        for chunk, padded, encoding in itertools.islice(encoded, text.text.count(IMAGE_TAG) + 1):
            spans = [(first - start, stop - start) for first, stop in text.spans]
            ids.append(encoding.ids)
            labels.append(_labels(encoding, spans, len(padded) - len(chunk)))
            start += len(chunk) + len(IMAGE_TAG)
        surplus = surplus_bos(tokenizer, ids)
        joined = join_chunks(ids, surplus, IMAGE_PLACEHOLDER), join_chunks(labels, surplus, IGNORE)
        examples.append(Example(*(np.array(tokens, np.int32) for tokens in joined)))
    return examples


def _labels(encoding: Any, spans: Sequence[tuple[int, int]], extra: int) -> list[int]:
    """Labels of a chunk. ``spans`` are relative to it; its encoding has ``extra`` characters before it."""
    ids = encoding.ids
    labels = [IGNORE] * len(ids)
    ends = [end for _, end in encoding.offsets]
    for first, stop in spans:
        # The space that the tokenizer prepends to a chunk has no characters; it belongs to the span that starts there.
        begin = bisect.bisect_right(ends, first + extra) if first > 0 else 0
        end = bisect.bisect_right(ends, stop + extra) if stop > 0 else 0
        labels[begin:end] = ids[begin:end]
    return labels
