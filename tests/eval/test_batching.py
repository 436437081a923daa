"""Many questions in batches of one shape."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image
from tiny_run import CONFIG, write_start

from pdrop_jax.config import Tiling
from pdrop_jax.errors import UserError
from pdrop_jax.eval import batching as answering
from pdrop_jax.eval.batching import answer_all, plan_batches
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.engine import generate, start
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.processor import Processor

SETTINGS = {"batch_size": 2, "sampling": Sampling(4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("answering") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, dtype="float32")


def noise(seed, width=40, height=30):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def questions():
    """Five about a picture and three without, in turn."""
    texts = ["What is it?", "Hi!", "Who?", "Why not?", "How many are there?", "No", "Where?", "Is it?"]
    return [Question(f"q{n}", text, () if n in (1, 3, 5) else (noise(n),)) for n, text in enumerate(texts)]


def test_every_question_is_answered_as_it_is_alone(model, questions):
    found = {}
    for numbers, generation in answer_all(model, questions, **SETTINGS):
        assert len(generation.texts) == len(generation.kept) == len(generation.token_ids) == len(numbers)
        found |= dict(zip(numbers, generation.token_ids, strict=True))
    assert sorted(found) == list(range(8))
    for number, question in enumerate(questions):
        twice = generate(model, [question.text] * 2, [list(question.images)] * 2, Sampling(4))
        assert found[number] == twice.token_ids[0]
    assert len({tuple(ids) for ids in found.values()}) > 4


def test_batches_are_of_one_bucket_the_largest_first_and_of_one_size(model, questions):
    groups = plan_batches(model.processor, questions, 2, 4)
    assert [group.questions for group in groups] == [[0, 2], [4, 6], [7], [1, 3], [5]]
    assert [group.bucket.slots for group in groups] == [48, 48, 48, 32, 32]


def test_the_rest_of_a_bucket_compiles_nothing(model, questions):
    list(answer_all(model, questions, **SETTINGS))
    compiled = start._cache_size()
    list(answer_all(model, questions[:7], **SETTINGS))
    assert start._cache_size() == compiled


def test_what_was_answered_is_left_out_and_batches_stay_the_same(model, questions):
    batches = answer_all(model, questions, **SETTINGS)
    whole = dict(itertools.chain.from_iterable(zip(n, g.token_ids, strict=True) for n, g in batches))
    rest = list(answer_all(model, questions, **SETTINGS, answered={0, 2, 1, 4}))
    assert [numbers for numbers, _ in rest] == [[4, 6], [7], [1, 3], [5]]
    for numbers, generation in rest:
        assert generation.token_ids == [whole[n] for n in numbers]


def test_pictures_are_read_for_the_next_batch_only(model, monkeypatch):
    read = []
    monkeypatch.setattr(answering, "read_image", lambda image: read.append(image) or image)
    batches = answer_all(model, [Question(n, "Who?", (noise(n),)) for n in range(12)], **SETTINGS)
    for done in range(1, 4):
        next(batches)
        assert 2 * done <= len(read) <= 2 * (done + 1)
    batches.close()
    assert len(read) <= 8


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("sizes", [[(30, 40)], [(28, 28)], [(20, 90)], [(90, 20), (30, 30)], []])
def test_buckets_are_those_of_the_tiled_pictures(folder, alone, sizes):
    config = dataclasses.replace(CONFIG, tiling=dataclasses.replace(Tiling.next(28), alone=alone))
    processor = Processor.load(folder, config)
    images = tuple(noise(1, width, height) for height, width in sizes)
    (group,) = plan_batches(processor, [Question(1, "What?", images)], 1, 4)
    assert group.bucket == choose_bucket([processor.row("What?", images)], config, 4)


def test_a_question_that_does_not_fit_is_named(model, questions):
    long = Question("long", "word " * 300, where="q.jsonl line 9")
    with pytest.raises(UserError, match=r"question 'long', q.jsonl line 9: .*positions"):
        next(answer_all(model, [*questions, long], **SETTINGS))


def test_a_picture_that_cannot_be_read_is_named(model, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"question 'b': .*broken\.png: cannot be read"):
        list(answer_all(model, [Question("b", "What?", (path,))], **SETTINGS))


def test_a_batch_needs_a_row(model, questions):
    with pytest.raises(UserError, match=r"must be in 1\.\.4,096, got 0"):
        next(answer_all(model, questions, batch_size=0))
