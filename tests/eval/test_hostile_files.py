"""Files of questions, answers and annotations with every value replaced by what it must not be: a score, or a line."""

import json
import os

import pytest
from mutations import NASTY, mutations, one_line, paths_of
from PIL import Image

from pdrop_jax.errors import UserError
from pdrop_jax.eval import scoring
from pdrop_jax.eval.questions import read_questions

VALUES = [*NASTY, "../a.png", "/etc/passwd", "a\0b", "x" * 5000, [[1]], [{}], {"answer": None}]

# As bytes of a file in place of JSON.
RAW = [
    b"",
    b"\xff\xfe\x00",
    b"\x00" * 100,
    b'{"question_id": 1' + b"0" * 5000 + b', "text": "x"}',
    b"[" * 100_000,
    b'{"question_id": ' * 100_000,
    b'{"question_id": "\\ud800", "text": "x"}',
    b'{"question_id": 1, "text": "caf\xe9"}',
    b'[{"id": 1}',
    b"null",
    b'"' + b"x" * 100,
    b"1e999",
]

TURN = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "A"}]
LINES = [
    {"question_id": 1, "text": "What?", "image": "a.png", "category": "x"},
    {"question_id": "two", "text": "<image> Who?", "image": ["a.png"], "answer": "I", "reworded": "Who is it?"},
]
RECORDS = [{"id": "4", "conversations": TURN, "image": "a.png"}]
ANSWER = {"question_id": "1", "text": "A", "prompt": "<image>\nWhich?"}
PEOPLE = [{"answer": "a"}, {"answer": "b"}]
# Benchmark -> its files, by the names that they have in a folder.
BENCHMARKS = {
    "scienceqa": {
        "a": [ANSWER],
        "problems.json": {"1": {"answer": 0, "choices": ["a", "b"], "question": "Which?"}},
        "pid_splits.json": {"test": ["1"], "val": []},
    },
    "vqav2": {
        "a": [ANSWER],
        "v": {"annotations": [{"question_id": "1", "answers": PEOPLE, "answer_type": "other"}]},
    },
    "textvqa": {
        "a": [ANSWER | {"prompt": "Which?"}],
        "v": {"data": [{"image_id": "1", "question": "Which?", "answers": ["a", "b"]}]},
    },
    "gqa": {"a": [ANSWER], "v": {"1": {"answer": "a", "isBalanced": True, "types": {"structural": "query"}}}},
    "pope": {
        "a": [ANSWER],
        "q": [{"question_id": "1", "text": "Is it?", "category": "random"}],
        "coco_pope_random.json": [{"text": "Is it?", "label": "yes"}],
    },
    "mme": {"a": [{"question_id": "existence/1", "text": "Yes", "prompt": "Is it?"}]},
}
JSON_LINES = ("a", "q", "coco_pope_random.json")


def lines(data):
    return "\n".join(map(json.dumps, data)) if isinstance(data, list) else json.dumps(data)


def without(data):
    """(path, document) without each key of ``data``."""
    for *path, key in paths_of(data):
        changed = json.loads(json.dumps(data))
        at = changed
        for step in path:
            at = at[step]
        del at[key]
        yield (*path, key), changed


def every(data):
    """(what, document): each value replaced, each left out, and the document as a whole."""
    for path, value, changed in mutations(data, VALUES):
        yield (path, repr(value)[:50]), changed
    for path, changed in without(data):
        yield (path, "left out"), changed
    for value in VALUES:
        yield ((), repr(value)[:50]), value


@pytest.fixture
def questions(tmp_path):
    """Reads a file of questions of such contents; a.png lies beside it."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def read(content):
        (tmp_path / "q").write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_questions(tmp_path / "q", tmp_path)

    return read


@pytest.mark.parametrize(("data", "form"), [(LINES, lines), (RECORDS, json.dumps)], ids=["lines", "list"])
def test_questions(questions, data, form):
    assert len(questions(form(data))) == len(data)
    refused = 0
    for what, changed in every(data):
        with one_line(what) as said:
            assert all(isinstance(question.text, str) for question in questions(form(changed)))
        refused += len(said)
    assert refused > 100
    whole = form(data).encode()
    for content in (*RAW, whole[:-1], whole[: len(whole) // 2], whole.replace(b"W", b"\xff")):
        with one_line(content[:30]):
            questions(content)


def score(benchmark, folder, files):
    for name, data in files.items():
        if not isinstance(data, bytes):
            data = (lines(data) if name in JSON_LINES else json.dumps(data)).encode()
        (folder / name).write_bytes(data)
    if benchmark == "pope":
        return scoring.score_pope(folder / "a", folder / "q", folder)
    place = folder if benchmark in ("scienceqa", "mme") else folder / "v"
    return getattr(scoring, f"score_{benchmark}")(folder / "a", place)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_scores(benchmark, tmp_path):
    (tmp_path / "existence").mkdir()
    (tmp_path / "existence" / "1.txt").write_text("Is it?\tYes\n")
    files = BENCHMARKS[benchmark]
    assert score(benchmark, tmp_path, files).answers == 1
    refused = 0
    for name, data in files.items():
        for what, changed in [*every(data), *((content[:30], content) for content in RAW)]:
            with one_line((name, what)) as said:
                assert score(benchmark, tmp_path, files | {name: changed}).answers == 1
            refused += len(said)
    assert refused > 50


def test_annotations_of_mme_that_are_no_files(tmp_path):
    (tmp_path / "existence").mkdir()
    os.mkfifo(tmp_path / "existence" / "1.txt")
    with pytest.raises(UserError, match=r"1\.txt is a FIFO, expected a file"):
        score("mme", tmp_path, BENCHMARKS["mme"])


@pytest.mark.parametrize("name", ["../a.png", "b/../../a.png", "/etc/hostname"])
def test_a_picture_outside_its_folder(name, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "images" / "b").mkdir(parents=True)
    (tmp_path / "q").write_text(json.dumps({"question_id": 1, "text": "Who?", "image": name}))
    with pytest.raises(UserError, match=r"q line 1: the picture '.*' lies outside the folder .*: .*--outside-images"):
        read_questions(tmp_path / "q", tmp_path / "images")
    if name == "../a.png":
        (question,) = read_questions(tmp_path / "q", tmp_path / "images", outside_images=True)
        assert question.images == (tmp_path / "images" / name,)
