"""AnswerRecord files: complete, in order, and of one model, whatever happens to the runs that write them."""

import contextlib
import dataclasses
import json
import os
import resource

import numpy as np
import pytest
from command import Forked, kill_at_line
from PIL import Image
from tiny_run import write_start

from pdrop_jax.errors import UserError
from pdrop_jax.eval.evaluate import evaluate
from pdrop_jax.eval.journal import Journal
from pdrop_jax.eval.shares import Share
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.schedule import DropSchedule

QUESTIONS = 24
SETTINGS = {"batch_size": 2, "sampling": Sampling(8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, images/, q.jsonl and a.jsonl, the answers of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_start(folder / "model")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for n in range(QUESTIONS):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), np.uint8)).save(folder / "images" / f"{n}.png")
        image = {"image": f"{n}.png"} if n % 3 else {}
        lines.append({"question_id": n, "text": f"What is in {n}?", **image, "category": "x"})
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(folder, folder / "a.jsonl")
    return folder


def run(folder, out, questions="q.jsonl", model="model", **changes):
    return evaluate(folder / model, folder / questions, folder / "images", out, **{**SETTINGS, **changes})


def unfinished(out):
    return out.with_name(out.name + ".unfinished")


def test_lines_are_llavas_in_the_order_of_the_questions(folder):
    answers = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == list(range(QUESTIONS))
    assert [answer["prompt"] for answer in answers] == [f"What is in {n}?" for n in range(QUESTIONS)]
    assert {tuple(answer) for answer in answers} == {
        ("question_id", "prompt", "text", "answer_id", "model_id", "metadata")
    }
    assert len({answer["answer_id"] for answer in answers}) == QUESTIONS
    assert len({answer["text"] for answer in answers}) > 4
    assert answers[0]["model_id"] == "model"
    assert answers[0]["metadata"]["schedule"] == {"layers": [1], "ratios": [0.5], "positions": "dense"}
    assert (answers[0]["metadata"]["dtype"], answers[0]["metadata"]["max_new_tokens"]) == ("float32", 8)
    assert not unfinished(folder / "a.jsonl").exists()


def test_what_is_complete_is_left_alone(folder):
    before = (folder / "a.jsonl").stat()
    own = DropSchedule((1,), (0.5,))
    assert run(folder, folder / "a.jsonl", schedule=own, batch_size=5).answered == 0
    assert (folder / "a.jsonl").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("whole", [0, 1, 7, QUESTIONS])
@pytest.mark.parametrize("torn", [b"", b'{"question_id": 3, "pro', b"\xff"])
def test_a_run_goes_on_after_any_line_whole_or_torn(folder, tmp_path, whole, torn):
    out, lines = tmp_path / "a.jsonl", (folder / "a.jsonl").read_bytes().splitlines(keepends=True)
    np.random.default_rng(whole).shuffle(lines)
    unfinished(out).write_bytes(b"".join(lines[:whole]) + torn)
    assert run(folder, out).answered == QUESTIONS - whole
    assert out.read_bytes() == (folder / "a.jsonl").read_bytes()
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_drawn_answers_go_on_as_they_would_have(folder, tmp_path):
    drawing = Sampling(8, temperature=3.0, seed=1, top_k=50)
    run(folder, tmp_path / "a.jsonl", sampling=drawing)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    unfinished(tmp_path / "b.jsonl").write_bytes(b"".join(lines[5:12]))
    run(folder, tmp_path / "b.jsonl", sampling=drawing)
    assert (tmp_path / "b.jsonl").read_bytes() == b"".join(lines)
    with pytest.raises(UserError, match=r'another sampling: .*"seed": 1.*"seed": 2'):
        run(folder, tmp_path / "a.jsonl", sampling=dataclasses.replace(drawing, seed=2))


@pytest.fixture(params=["finished", "unfinished"])
def answered(request, folder, tmp_path):
    """A file with the answers of ``folder``, or the same not yet finished."""
    out = tmp_path / "a.jsonl"
    path = out if request.param == "finished" else unfinished(out)
    path.write_bytes((folder / "a.jsonl").read_bytes())
    return out, path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": DropSchedule.none()}, 'another schedule: {"layers": [1], "ratios": [0.5], "positions"'),
        ({"dtype": "bfloat16"}, 'another dtype: "float32", this run has "bfloat16"'),
        ({"quantize": "int8"}, 'another quantization: null, this run has "int8"'),
        ({"sampling": Sampling(9)}, "another max_new_tokens: 8, this run has 9"),
        ({"sampling": Sampling(8, temperature=1.0)}, "another sampling: null"),
        ({"model": "other"}, "another model: "),
        ({"questions": "changed.jsonl"}, 'question 7 when it read "What is in 7?", now it reads "What is in seven?"'),
        ({"questions": "picture.jsonl"}, "question 7 about another picture"),
        ({"questions": "fewer.jsonl"}, "question 23, which is not in the file of questions"),
    ],
)
def test_answers_of_another_run_are_refused(folder, answered, changes, words):
    out, path = answered
    text = (folder / "q.jsonl").read_text()
    (folder / "changed.jsonl").write_text(text.replace("in 7?", "in seven?"))
    (folder / "picture.jsonl").write_text(text.replace('"7.png"', '"8.png"'))
    (folder / "fewer.jsonl").write_text("".join(text.splitlines(keepends=True)[:-1]))
    if not (folder / "other").exists():
        write_start(folder / "other")
        sizes = folder / "other" / "sizes.json"
        sizes.write_text(sizes.read_text() + " ")  # as another checkpoint's, whose files have other names
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        run(folder, out, **changes)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path} holds ")
    assert "\n" not in str(caught.value)
    assert "--out" in str(caught.value)
    assert path.read_bytes() == before


def test_new_questions_are_refused_once_the_file_is_finished(folder, tmp_path):
    (folder / "more.jsonl").write_text((folder / "q.jsonl").read_text() + '{"question_id": 99, "text": "And?"}')
    out = tmp_path / "a.jsonl"
    out.write_bytes((folder / "a.jsonl").read_bytes())
    with pytest.raises(UserError, match="holds 24 answers to 25 questions"):
        run(folder, out, "more.jsonl")


def test_answers_of_another_program_are_refused(folder, tmp_path):
    out = tmp_path / "a.jsonl"
    out.write_text('{"question_id": 0, "prompt": "What is in 0?", "text": "x", "answer_id": "y", "metadata": {}}\n')
    with pytest.raises(UserError, match="another model: null"):
        run(folder, out)


def test_a_malformed_line_is_named(folder, tmp_path):
    out, lines = tmp_path / "a.jsonl", (folder / "a.jsonl").read_bytes().splitlines(keepends=True)
    unfinished(out).write_bytes(lines[0] + b"{\n" + lines[1])
    with pytest.raises(UserError, match=r"a\.jsonl\.unfinished line 2 is malformed"):
        run(folder, out)


def test_a_mistake_leaves_nothing_behind(folder, tmp_path):
    (folder / "long.jsonl").write_text(json.dumps({"question_id": 1, "text": "word " * 300}))
    for changes in ({"questions": "long.jsonl"}, {"questions": "none.jsonl"}, {"model": "images"}, {"batch_size": 0}):
        with pytest.raises(UserError):
            run(folder, tmp_path / "a.jsonl", **changes)
    with pytest.raises(UserError, match="drop after layer 9"):
        run(folder, tmp_path / "a.jsonl", schedule=DropSchedule((9,), (0.5,)))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("older", [b"precious", b'{"question_id": 0, "prompt": "What is in 0?", "text": "x"}\n'])
def test_overwrite_starts_over(folder, tmp_path, older):
    """Whatever is there: answers of another model, finished or not, or a file of somebody else's."""
    out = tmp_path / "a.jsonl"
    out.write_bytes(older)
    unfinished(out).write_bytes(older)
    with pytest.raises(UserError, match=r"a\.jsonl (line 1|holds)"):
        run(folder, out)
    assert run(folder, out, overwrite=True).answered == QUESTIONS
    assert out.read_bytes() == (folder / "a.jsonl").read_bytes()
    assert os.listdir(tmp_path) == ["a.jsonl"]
    assert run(folder, out, overwrite=True).answered == QUESTIONS


def test_what_is_not_an_answer_file_stays_as_it_is(folder, tmp_path):
    out = tmp_path / "a.jsonl"
    for content in (b"precious", b"precious\nwithout a line break at the end"):
        unfinished(out).write_bytes(content)
        with pytest.raises(UserError):
            run(folder, out, model="images" if b"\n" not in content else "model")
        assert unfinished(out).read_bytes() == content
    unfinished(out).unlink()
    for target, path in ((folder / "q.jsonl", out), (folder / "images" / "1.png", unfinished(out))):
        before = target.read_bytes()
        path.symlink_to(target)
        with pytest.raises(UserError, match="is read by this command"):
            run(folder, out, overwrite=True)
        assert target.read_bytes() == before
        path.unlink()
    os.mkfifo(unfinished(out))
    with pytest.raises(UserError, match="unfinished is a FIFO"):
        run(folder, out)


def test_answers_are_written_through_a_link(folder, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").symlink_to("b/answers.jsonl")
    assert run(folder, tmp_path / "a.jsonl").out == tmp_path / "a.jsonl"
    assert (tmp_path / "b/answers.jsonl").read_bytes() == (folder / "a.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl").is_symlink()
    assert run(folder, tmp_path / "a.jsonl").answered == 0


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond ``size`` bytes: as on a full disk, writing more is an OSError in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_costs_no_answer(folder, tmp_path):
    """Neither while answers are appended nor while they are put into order; nothing half-written is left."""
    out, lines = tmp_path / "a.jsonl", (folder / "a.jsonl").read_bytes().splitlines(keepends=True)
    answers = [json.loads(line) for line in lines]
    first = len(b"".join(lines[:3]))
    with Journal(out) as journal:
        journal.append(answers[:3])
        with full_disk(first + 10), pytest.raises(OSError, match=r"a\.jsonl\.unfinished"):
            journal.append(answers[3:])
        assert unfinished(out).read_bytes() == b"".join(lines[:3])
        journal.append(answers[3:])
        with full_disk(first), pytest.raises(OSError, match="too large"):
            journal.finish([answer["answer_id"] for answer in answers])
    assert os.listdir(tmp_path) == ["a.jsonl.unfinished"]
    assert run(folder, out).answered == 0
    assert out.read_bytes() == b"".join(lines)


def test_nothing_is_left_where_not_one_answer_could_be_written(folder, tmp_path):
    with full_disk(10), pytest.raises(OSError, match="too large"):
        run(folder, tmp_path / "b" / "a.jsonl")
    assert os.listdir(tmp_path) == []


def test_one_process_writes_a_file(folder, tmp_path):
    with (
        Journal(tmp_path / "a.jsonl") as journal,
        pytest.raises(UserError, match="is being written by another process"),
    ):
        run(folder, tmp_path / "a.jsonl")
    assert not journal.path.exists()


def test_killed_at_any_moment_no_answer_is_lost_or_doubled(folder, tmp_path):
    """Two processes of the command, each killed after its first answers; then both once more, at the same time."""
    out = tmp_path / "a.jsonl"
    parts = [tmp_path / name for name in ("a.jsonl.unfinished", "a.jsonl.unfinished-1")]
    longer = ("--batch-size", "1", "--max-new-tokens", "120")
    paths = ("--questions", folder / "q.jsonl", "--images", folder / "images", "--out", out)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}

    def begin(process):
        shared = ("--num-processes", "2", "--process-id", str(process))
        return Forked("eval", "--model", folder / "model", *paths, *longer, *shared, env=environment)

    for process, part in [(begin(n), part) for n, part in enumerate(parts)]:
        kill_at_line(process, part)
    assert not out.exists()
    for process in [begin(0), begin(1)]:
        process.finish()
    run(folder, tmp_path / "b.jsonl", batch_size=1, sampling=Sampling(120))
    assert out.read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl"]


def test_processes_share_the_questions(folder, tmp_path):
    """In any order, each with a file of its own; the last one joins them, and later ones find nothing to do."""
    out = tmp_path / "a.jsonl"
    results = [run(folder, out, share=Share(index, 3)) for index in (2, 0)]
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl.unfinished", "a.jsonl.unfinished-2"]
    results.append(run(folder, out, share=Share(1, 3)))
    assert [result.missing for result in results] == [QUESTIONS - results[0].answered, results[2].answered, 0]
    assert min(result.answered for result in results) >= 6
    assert sum(result.answered for result in results) == QUESTIONS
    assert out.read_bytes() == (folder / "a.jsonl").read_bytes()
    assert os.listdir(tmp_path) == ["a.jsonl"]
    assert run(folder, out, share=Share(2, 3)).missing == 0


def test_another_number_of_processes_goes_on(folder, tmp_path):
    out = tmp_path / "a.jsonl"
    part = run(folder, out, share=Share(3, 4)).answered
    (tmp_path / "a.jsonl.unfinished-7").write_bytes(b'{"question_id": 3, "pro')  # of a process that was killed
    (tmp_path / "a.jsonl.unfinished-x").write_text("of somebody else")
    with pytest.raises(UserError, match=r"unfinished-3 holds answers of another schedule"):
        run(folder, out, share=Share(0, 2), schedule=DropSchedule.none())
    with pytest.raises(UserError, match="--overwrite would delete what other processes have written: remove"):
        run(folder, out, share=Share(0, 2), overwrite=True)
    assert run(folder, out).answered == QUESTIONS - part
    assert out.read_bytes() == (folder / "a.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.jsonl.unfinished-x"]


def test_two_finish_at_once(folder, tmp_path):
    """Each has seen that all answers are there before the other has joined them."""
    out = tmp_path / "a.jsonl"
    answers = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    ids = [answer["answer_id"] for answer in answers]
    with Journal(out, share=Share(0, 2)) as first, Journal(out, share=Share(1, 2)) as second:
        first.append(answers[::2])
        second.append(answers[1::2])
        assert first.missing(ids) == second.missing(ids) == 0
        assert second.finish(ids) == first.finish(ids) == 0
    assert out.read_bytes() == (folder / "a.jsonl").read_bytes()
    assert os.listdir(tmp_path) == ["a.jsonl"]
