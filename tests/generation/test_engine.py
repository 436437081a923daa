"""Continuous batching: whatever shares the batch, a request is answered as ``generate`` answers it alone."""

import functools
import random
import threading

import pytest
from PIL import Image
from test_generation import BLUE, COMPILED, RED, model

from pdrop_jax.batch import Bucket
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.sampling import Sampling

LONGEST = 10
BUCKETS = [Bucket(32), Bucket(64), Bucket(32, (16,)), Bucket(64, (16, 16))]
TWO = "<image> <image> Which?"
GREEN = Image.new("RGB", (9, 9), "green")
QUESTIONS = [
    *((f"What is {n}?", None) for n in range(8)),
    *((f"{n} is more than a few words, so that it takes many tokens", None) for n in range(4)),
    *((f"Is it {n}?", RED if n % 2 else BLUE) for n in range(8)),
    *((f"{n} {TWO}", [RED, GREEN] if n % 2 else [GREEN, BLUE]) for n in range(4)),
]


@functools.cache
def answers():
    """The longest greedy answer to each of QUESTIONS, and the tokens kept, from ``generate``."""
    found = []
    for start, stop in [(0, 8), (8, 12), (12, 20), (20, 24)]:
        prompts, images = zip(*QUESTIONS[start:stop], strict=True)
        answer = generate(model(), prompts, images, Sampling(LONGEST))
        found += zip(answer.token_ids, answer.kept, answer.stage_lengths, strict=True)
    return found


@pytest.fixture(scope="module")
def engine():
    with Engine(model(), 5, max_new_tokens=LONGEST, buckets=BUCKETS, max_waiting=600) as engine:
        engine.warm_up()
        yield engine


def test_five_hundred_requests_are_answered_as_alone_and_compile_nothing(engine):
    """Of random lengths, a sixth cancelled, from four threads in random order; each bucket is used."""
    expected, before, wrong = answers(), len(COMPILED), []

    def ask(seed):
        rng = random.Random(seed)
        asked = []
        for _ in range(125):
            number, length = rng.randrange(len(QUESTIONS)), rng.randint(1, LONGEST)
            prompt, images = QUESTIONS[number]
            handle = engine.submit(prompt, images, Sampling(length))
            if rng.random() < 1 / 6:
                handle.cancel()
            asked.append((handle, number, length))
        for handle, number, length in asked:
            found, (ids, kept, lengths) = handle.result(), expected[number]
            if found.finish_reason == "cancelled":
                right = handle.cancelled and found.token_ids == ids[: len(found.token_ids)]
            else:
                ended = "length" if length <= len(ids) else "stop"
                shown = [[image for image in at if image] for at in kept]
                right = (found.token_ids, found.finish_reason) == (ids[:length], ended)
                right &= (found.kept, found.stage_lengths) == (shown, lengths)
                right &= "".join(handle).strip() == found.text
            if not right:
                wrong.append((number, length, found))

    threads = [threading.Thread(target=ask, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert COMPILED[before:] == []
