"""What an engine keeps between requests: answers are those of ``generate``, whatever was asked before."""

import dataclasses
import functools
import itertools
import random

import jax
import numpy as np
import pytest
from PIL import Image
from test_generation import BLUE, COMPILED, CONFIG, RED, model

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig, Tiling
from pdrop_jax.errors import UserError
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.engine import generate, start
from pdrop_jax.generation.lru import CacheCounts, Lru
from pdrop_jax.generation.next_token import rows_sampler
from pdrop_jax.generation.pools import empty_images, empty_prefixes, images_of, pool_bytes
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.reuse import ImageCache, PrefixCache, Reusable
from pdrop_jax.generation.running import joined, without_crops
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.slots import SlotShape, admit, admit_after, empty_slots
from pdrop_jax.inputs.anyres import tiled
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.model.params import abstract_params
from pdrop_jax.model.vlm import embed_images
from pdrop_jax.schedule import DropSchedule

NEW = 6
ONE, TWO = Bucket(32, (16,)), Bucket(64, (16, 16))
GREEN = Image.new("RGB", (9, 9), "green")
ASKED = [
    *((f"<image> What is {n}?", picture) for n, picture in itertools.product(range(3), (RED, BLUE, GREEN))),
    *((f"<image> and <image>: which is {n}?", [RED, last]) for n, last in itertools.product(range(2), (BLUE, RED))),
    ("<image> A question of so many words that it is asked in the larger of the two buckets", BLUE),
    ("What is behind? <image>", RED),
    ("No picture", None),
]
IMAGE = pool_bytes(empty_images, CONFIG, 1, 16, np.float32)
PREFIX = pool_bytes(empty_prefixes, CONFIG, 1, 96, np.float32)


@functools.cache
def expected(score="pyramiddrop"):
    """(token ids, kept, stage lengths) of each of ASKED, from ``generate``."""
    found = []
    for begin, end in [(0, 9), (9, 13), (13, 16)]:
        prompts, pictures = zip(*ASKED[begin:end], strict=True)
        answer = generate(scored(score), prompts, pictures, Sampling(NEW))
        kept = [[[image for image in at if image] for at in row] for row in answer.kept]
        found += zip(answer.token_ids, kept, answer.stage_lengths, strict=True)
    return found


def scored(score):
    config = dataclasses.replace(CONFIG, schedule=dataclasses.replace(CONFIG.schedule, score=score))
    return dataclasses.replace(model(), config=config)


def ask(engine, numbers):
    handles = [engine.submit(*ASKED[n], Sampling(NEW)) for n in numbers]
    return [handle.result() for handle in handles]


def test_answers_do_not_depend_on_what_is_cached():
    """Requests in random order, with a cache that is too small for all of their beginnings; nothing compiles."""
    rng = random.Random(0)
    numbers = [n for _ in range(8) for n in rng.sample(range(len(ASKED)), len(ASKED))]
    caches = {"image_cache": 4 * IMAGE, "prefix_cache": 5 * PREFIX}
    with Engine(model(), 2, max_new_tokens=NEW, buckets=[ONE, TWO], prefill_rows=2, **caches) as engine:
        engine.warm_up()
        before = len(COMPILED)
        answers = ask(engine, numbers)
        assert COMPILED[before:] == []
        counts = engine.caches
    for n, answer in zip(numbers, answers, strict=True):
        assert (answer.token_ids, answer.kept, answer.stage_lengths) == expected()[n], ASKED[n]
    images, prefixes = counts["images"], counts["prefixes"]
    assert (images.misses, images.entries, images.bytes) == (3, 3, 4 * IMAGE)
    assert (prefixes.entries, prefixes.capacity, prefixes.bytes) == (4, 4, 5 * PREFIX)
    assert prefixes.hits + prefixes.misses == 8 * 15  # all but one have a picture
    assert prefixes.hits > 30
    assert prefixes.misses > 4
    cached = [answer.cached for answer in answers]
    assert sum(map(bool, cached)) == prefixes.hits


@pytest.mark.parametrize(
    ("caches", "score"), [({"image_cache": 4 * IMAGE}, "cls"), ({"prefix_cache": 8 * PREFIX}, "norm")]
)
def test_each_cache_alone(caches, score):
    """One with the attention of the vision tower's class token, which is cached too."""
    with Engine(scored(score), 2, max_new_tokens=NEW, buckets=[TWO], prefill_rows=1, **caches) as engine:
        numbers = [0, 1, 3, 9, 15, 9, 0]
        answers = ask(engine, numbers)
        for n, answer in zip(numbers, answers, strict=True):
            assert (answer.token_ids, answer.stage_lengths) == (expected(score)[n][0], expected(score)[n][2])
        (counts,) = engine.caches.values()
        assert (counts.hits, counts.misses) == ((6, 2) if score == "cls" else (3, 3))
