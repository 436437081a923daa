"""Files of questions: what is read out of them, and what is wrong with them."""

import json

import pytest
from PIL import Image

from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import read_questions


@pytest.fixture
def write(tmp_path):
    """Writes lines, or a whole file, and gives its path; a.png and b.png lie beside it."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)

    def write(*lines, whole=None):
        path = tmp_path / "q.jsonl"
        path.write_text(whole or "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return path

    return write


def line(number=1, text="What?", **fields):
    return {"question_id": number, "text": text, **fields}


def test_lines_with_one_picture_several_and_none(write, tmp_path):
    path = write(line(1, image="a.png", category="x"), "", line("two", image=["a.png", "b.png"]), line(3, image=None))
    one, two, three = read_questions(path, tmp_path)
    assert (one.id, one.text, one.images, one.fields) == (1, "What?", (tmp_path / "a.png",), {"category": "x"})
    assert (two.id, two.images, two.where) == ("two", (tmp_path / "a.png", tmp_path / "b.png"), f"{path} line 3")
    assert three.images == ()


def test_a_list_of_conversations_asks_its_first_questions(write, tmp_path):
    def record(name, text, **rest):
        return {"id": name, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}], **rest}

    records = [record("4", "Which?\n<image>", image="a.png"), record("5", "Why<im<image>age>?")]
    with_picture, without = read_questions(write(whole=json.dumps(records)), tmp_path)
    assert (with_picture.id, with_picture.text) == ("4", "<image>\nWhich?")
    assert (without.text, without.images) == ("Why?", ())


def test_an_id_may_stand_twice_if_it_names_the_picture(write, tmp_path):
    names = ("a", "a.png", "task/a.png")
    questions = read_questions(write(*(line(n, t, image="a.png") for n in names for t in ("x", "y"))), tmp_path)
    assert [question.id for question in questions] == ["a", "a", "a.png", "a.png", "task/a.png", "task/a.png"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([line(), "{"], "line 2 is malformed: Expecting"),
        ([line(), "[1]"], "line 2 is malformed: expected a JSON object, got list"),
        (['{"question_id": 1, "text": "\\ud800"}'], "line 1 is malformed: 'utf-8' codec"),
        ([line(), {"question_id": 2}], "line 2 has no 'text'"),
        ([{"text": "Who?"}], "line 1 has no 'question_id'"),
        ([line(True)], "line 1: 'question_id' is true"),
        ([line(1, 7)], "line 1: 'text' is 7"),
        ([line(image=7)], "line 1: 'image' is neither"),
        ([line(1), line(2), line("1", "Who?")], "line 3: question_id '1' is that of"),
        ([line(text="<image> Who?")], "line 1: question 1 has 1 <image> tags but 0 pictures"),
        ([line(image=["a.png", "b.png"], text="<image> Who?")], "1 <image> tags but 2 pictures"),
        ([line(), line(2, image="c.png")], "1 pictures are not there: "),
        ([""], "holds no questions"),
        (["[]"], "holds no questions"),
        (["[3]"], "record 1 is malformed"),
        (['[{"id": 1, "conversations": []}]'], "record 1: its conversation is empty"),
    ],
)
def test_mistakes_are_one_line_that_names_the_line(write, tmp_path, lines, words):
    path = write(*lines)
    with pytest.raises(UserError) as caught:
        read_questions(path, tmp_path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_missing_pictures_are_counted_and_the_first_are_named(write, tmp_path):
    path = write(*(line(n, image=f"{n}.png") for n in range(5)), line(5, image="a.png"))
    with pytest.raises(UserError) as caught:
        read_questions(path, tmp_path)
    assert str(caught.value).startswith(
        f"5 pictures are not there: {tmp_path / '0.png'} of question 0, {path} line 1; "
    )
    assert "and 2 more" in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"q\.jsonl cannot be read: there is no such file"):
        read_questions(tmp_path / "q.jsonl")
