"""What an engine keeps between requests: answers are those of ``generate``, whatever was asked before."""

import itertools
import random

import jax
import numpy as np
import pytest
from PIL import Image
from test_generation import BLUE, COMPILED, CONFIG, RED, model

from pdrop_jax.batch import Bucket
from pdrop_jax.errors import UserError
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.lru import Lru
from pdrop_jax.generation.pools import empty_images, empty_prefixes, pool_bytes
from pdrop_jax.generation.sampling import Sampling

NEW = 6
BUCKETS = [Bucket(32), Bucket(32, (16,)), Bucket(64, (16, 16))]
GREEN = Image.new("RGB", (9, 9), "green")
ASKED = [
    *((f"<image> What is {n}?", picture) for n, picture in itertools.product(range(4), (RED, BLUE, GREEN))),
    *((f"<image> and <image>: which is {n}?", [RED, picture]) for n, picture in itertools.product(range(2), (BLUE, RED))),
    ("<image> A question of so many words that it is asked in the larger of the two buckets", BLUE),
    ("What is behind? <image>", RED),
    ("No picture", None),
]
IMAGE = pool_bytes(empty_images, CONFIG, 1, 16, np.float32)
PREFIX = pool_bytes(empty_prefixes, CONFIG, 1, 96, np.float32)


def engine(images, prefixes):
    caches = {"image_cache": images * IMAGE, "prefix_cache": prefixes and (prefixes + 1) * PREFIX}
    return Engine(model(), 2, max_new_tokens=NEW, buckets=BUCKETS, prefill_rows=2, **caches)


@pytest.fixture(scope="module")
def expected():
    found = []
    for prompt, pictures in ASKED:
        answer = generate(model(), [prompt], [pictures], Sampling(NEW))
        kept = [[image for image in at if image] for at in answer.kept[0]]
        found.append((answer.token_ids[0], kept, answer.stage_lengths[0]))
    return found


@pytest.mark.parametrize(("images", "prefixes"), [(4, 0), (0, 4), (4, 4)])
def test_answers_do_not_depend_on_what_is_cached(images, prefixes, expected):
    """Two hundred requests in random order, with caches that are too small for all of their pictures and prefixes."""
    rng = random.Random(0)
    numbers = [n for _ in range(10) for n in rng.sample(range(len(ASKED)), len(ASKED))]
    with engine(images, prefixes) as running:
        running.warm_up()
        before = len(COMPILED)
        handles = [running.submit(*ASKED[n], Sampling(NEW)) for n in numbers]
        found = [handle.result() for handle in handles]
        assert COMPILED[before:] == []
        counts = running.caches
    for n, answer in zip(numbers, found, strict=True):
        assert (answer.token_ids, answer.kept, answer.stage_lengths) == expected[n], ASKED[n]
    print(counts)
    assert list(counts) == ["images"] * bool(images) + ["prefixes"] * bool(prefixes)
