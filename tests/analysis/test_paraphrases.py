"""Rewordings of a wanted edit size, from templates or from a user's file."""

import json

import pytest

from pdrop_jax.analysis.paraphrases import Rewording, closest, matched, read_paraphrases, templates
from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import Question

TEXT = "<image>\nHow many bags are there in the picture?\nAnswer with a number."
QUESTIONS = [Question(1, TEXT), Question("b", "Which bag is the largest of all?")]


def words(texts):
    """A tokenizer of words."""
    return [[hash(word) for word in text.split()] for text in texts]


def test_templates_leave_tags_and_instructions_alone():
    found = templates(TEXT)
    assert 100 < len(found) == len(set(found)) < 600
    assert TEXT not in found
    assert all(text.startswith("<image>\n") and text.count("<image>") == 1 for text in found)
    assert all(text.endswith("\nAnswer with a number.") for text in found)
    assert "<image>\nHello. What number of bags are there within the picture? Please.\nAnswer with a number." in found
    assert templates("What is it? <image>")[0] == "What is it? <image> Please."


@pytest.mark.parametrize("size", [10, 20, 50, 100, 200])
def test_a_wanted_size_is_reached(size):
    """12 and 7 words, so that one word is 8.3 or 14.3 %."""
    (found,) = matched(QUESTIONS, [templates(question.text) for question in QUESTIONS], [size], words)
    for question, rewording in zip(QUESTIONS, found, strict=True):
        assert rewording.text != question.text
        assert size - 15 < rewording.size <= max(size, 15)


def test_smaller_ones_are_preferred():
    found = [Rewording(str(size), size) for size in (8.0, 10.4, 14.0, 14.4)]
    assert [closest(found, size).size for size in (10, 12, 14.2, 50, 1)] == [10.4, 10.4, 14.0, 14.4, 8.0]


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [{"question_id": 1, "text": "<image> Count."}, {"question_id": "b", "text": "Largest?"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"question_id": "b", "text": "The big one?"}]))
    own = read_paraphrases(path, QUESTIONS)
    assert own == {"1": ["<image> Count."], "b": ["Largest?", "The big one?"]}
    candidates = [own[str(question.id)] for question in QUESTIONS]
    (found,) = matched(QUESTIONS, candidates, [100], words)
    assert [rewording.text for rewording in found] == ["<image> Count.", "Largest?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 is empty: remove it"),
        ('{"question_id": 1, "text": "<image> x"}\n\n{"question_id": "b", "text": "x"}\n', "line 2 is empty"),
        ('{"question_id": 2, "text": "x"}', "line 1: question_id '2' is not in the file of questions"),
        ('{"question_id": "b", "text": " "}', "line 1: the text of 'b' is empty"),
        (json.dumps({"question_id": 1, "text": TEXT}), "line 1: the text of '1' is the question itself"),
        ('{"question_id": 1, "text": "x"}', "line 1: the text of '1' has 0 <image> tags, the question has 1"),
        ('{"question_id": "b", "text": "x"}', "has no paraphrase of 1 of 2 questions, such as '1'"),
        ('{"question_id": "b", "text": 7}', "line 1: 'text' is 7, which is not what is expected there"),
        ('{"question_id": "b"}', "line 1 has no 'text'"),
        ("[1]", "line 1 is malformed: expected a JSON object"),
    ],
)
def test_what_is_no_file_of_paraphrases(content, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_paraphrases(path, QUESTIONS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_that_are_repeated(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question_id": 1, "text": "x"}')
    with pytest.raises(UserError, match="the file of questions repeats some of them"):
        read_paraphrases(tmp_path / "p.jsonl", [*QUESTIONS, QUESTIONS[0]])
