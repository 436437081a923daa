"""What an engine keeps between requests: answers are those of ``generate``, whatever was asked before."""

import dataclasses
import functools
import itertools
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_generation import BLUE, COMPILED, CONFIG, RED, TOKENIZER, model

from pdrop_jax.batch import Bucket
from pdrop_jax.compilation_cache import CompilationStats
from pdrop_jax.config import StandbyConfig, Tiling
from pdrop_jax.errors import UserError
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.engine import generate, stop_ids_of
from pdrop_jax.generation.lru import CacheCounts, Lru
from pdrop_jax.generation.next_token import rows_sampler
from pdrop_jax.generation.pools import empty_images, empty_prefixes, images_of, pool_bytes
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.reuse import ImageCache, Reusable
from pdrop_jax.generation.running import joined, without_crops
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.slots import SlotShape, admit, admit_after, empty_slots
from pdrop_jax.inputs.anyres import tiled
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.frames import Standby
from pdrop_jax.inputs.processor import Processor, as_list
from pdrop_jax.model.params import abstract_params, init_params
from pdrop_jax.model.vlm import embed_images
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.serve.metrics import Metrics
from pdrop_jax.serve.responses import usage

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
    assert engine.caches == {}  # their memory is given back
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
        exported = Metrics({"own": engine}, CompilationStats()).text().decode()
    name = "images" if score == "cls" else "prefixes"
    assert f'pdrop_reuse_hits_total{{budget="own",cache="{name}"}} {counts.hits}.0' in exported
    assert f'pdrop_reuse_bytes{{budget="own",cache="{name}"}} {counts.bytes}.0' in exported
    cached = usage(answers[-1:]).get("prompt_tokens_details", {"cached_tokens": 0})
    assert cached == {"cached_tokens": answers[-1].cached}
    assert (answers[-1].cached > 0) == (name == "prefixes")


@functools.cache
def standby_model():
    """With as many standby tokens as a picture has patches: the two modes differ in nothing but what is shown."""
    config = dataclasses.replace(CONFIG, standby=StandbyConfig(16, temporal_layers=1, frames=3))
    params = init_params(config) | {name: x for name, x in model().params.items() if name != "standby"}
    return Model(config, params, Processor.load(TOKENIZER, config))


@pytest.mark.parametrize("caches", [{}, {"image_cache": 4 * IMAGE, "prefix_cache": 5 * PREFIX}], ids=len)
def test_a_picture_in_focus_is_not_that_in_standby(caches):
    """Asked in both modes in one batch, by turns and in one prompt, for the first time and again; nothing compiles."""
    asked = [
        ("<image> What is it?", RED),
        ("<image> What is it?", Standby(RED)),
        ("<image> and <image>?", [RED, Standby(RED)]),
        ("<image> and <image>?", [Standby(RED), RED]),
    ]
    expected = [generate(standby_model(), [prompt], [shown], Sampling(NEW)) for prompt, shown in asked]
    assert len({tuple(answer.token_ids[0]) for answer in expected}) > 2
    turn = threading.Lock()
    with Engine(standby_model(), 2, max_new_tokens=NEW, buckets=[TWO], prefill_rows=2, turn=turn, **caches) as engine:
        engine.warm_up()
        before = len(COMPILED)
        with turn:  # the first two are there before the engine looks
            handles = [engine.submit(*asked[n], Sampling(NEW)) for n in (0, 1, 2, 3, 1, 0, 3, 2)]
        for n, handle in zip((0, 1, 2, 3, 1, 0, 3, 2), handles, strict=True):
            answer = handle.result()
            assert (answer.token_ids, answer.stage_lengths) == (expected[n].token_ids[0], expected[n].stage_lengths[0])
        assert COMPILED[before:] == []
        if caches:
            images, prefixes = engine.caches["images"], engine.caches["prefixes"]
            assert (images.hits, images.misses, prefixes.entries) == (0, 1, 4)  # the first request alone is in focus
            assert prefixes.hits == 4


def rows_of(numbers):
    return [model().processor.row(ASKED[n][0], as_list(ASKED[n][1])) for n in numbers]


def reusable(numbers):
    return [Reusable.of(row, CONFIG, TWO) for row in rows_of(numbers)]


def image_cache():
    return ImageCache(model(), [ONE, TWO], 4 * IMAGE, 2, "auto")


def test_recalled_prompts_are_prefilled_to_float_rounding():
    """Keys and values of every stage, and the first token, beside a prefill of the whole prompts."""
    images, asked, before = image_cache(), [0, 13], [3, 1]  # of the same pictures
    of = reusable(asked)
    assert [each.prefix for each in of] == [each.prefix for each in reusable(before)]
    whole, earlier = (joined([assemble([row], CONFIG, TWO) for row in rows_of(n)]) for n in (asked, before))
    common = np.arange(2), np.zeros(2, np.uint32), rows_sampler([Sampling()] * 2), stop_ids_of(model()), None
    entries = np.array([2, 0])

    def state():
        return empty_slots(CONFIG, 2, SlotShape(NEW, (96 + NEW, 72 + NEW)), np.float32)

    def prefilled(batch):
        shown = images.entries(of, 2)
        pictures, pool = (images.pool, shown), empty_prefixes(CONFIG, 5, 96, np.float32)
        return admit(CONFIG, model().params, state(), without_crops(batch), *common, pictures, pool, entries)

    expected, _, *others = prefilled(whole)
    _, pool, *_ = prefilled(earlier)
    slots, rest = np.array([each.prefix_slots for each in of], np.int32), joined([each.rest for each in of])
    found, *ours = admit_after(
        CONFIG, model().params, state(), without_crops(whole), *common, pool, entries, slots, rest
    )
    assert np.array_equal(found.tokens, expected.tokens)
    assert np.array_equal(ours[0], others[0])
    valid = np.arange(96) < whole.length[:, None]
    assert np.array_equal(ours[1][0].keep & valid, others[1][0].keep & valid)
    for cache, other, length in zip(found.model.caches, expected.model.caches, ours[0], strict=True):
        for x, y in ((cache.k, other.k), (cache.v, other.v)):
            for row in range(2):
                assert np.abs(x - y)[:, row, :, : length[row]].max() < 1e-5


def test_a_cached_picture_is_bit_by_bit_what_encoding_it_gives():
    """It depends on nothing else: a picture is encoded alone, by the same program whenever that happens."""
    one, other = image_cache(), image_cache()
    (red, *_), pool = one.entries(reusable([0]), 2)[0], one.pool
    assert one.entries(reusable([3, 14]), 2)[:, 0].tolist() == [red, red]
    assert one.pool is pool  # nothing was encoded again
    green, again = other.entries(reusable([2, 9]), 2)[:, 0]
    assert green != again
    assert np.array_equal(pool.hidden[red], other.pool.hidden[again])


def test_a_picture_is_known_by_its_pixels(tmp_path):
    """Not by where it was read from."""
    path, keys = tmp_path / "picture.png", []
    for picture in (RED, BLUE):
        picture.save(path)
        keys += [Reusable.of(model().processor.row("What?", [x]), CONFIG, ONE).keys[0] for x in (picture, path)]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_images_of_tiles_are_put_together_from_a_pool():
    """Blended features and newlines of two pictures in a row, in the order of another row's pool."""
    config = dataclasses.replace(CONFIG, tiling=Tiling(((28, 56), (56, 56)), max_tiles=1, rounded=True))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), abstract_params(config))
    wide, high = (
        tiled(rng.standard_normal((n, 28, 28, 3), np.float32), size, config)
        for n, size in ((3, (28, 56)), (5, (50, 56)))
    )
    row = Row([5, IMAGE_PLACEHOLDER, 6, IMAGE_PLACEHOLDER], [wide, high])
    bucket = choose_bucket([row], config)
    batch = assemble([row], config, bucket)
    expected = jax.jit(embed_images, static_argnums=0)(config, params, batch)
    cache = ImageCache(Model(config, params, model().processor), [bucket], 2**20, 1, "auto")
    entries = cache.entries([Reusable.of(row, config, bucket)], 2)
    assert entries.tolist() == [[0, 1]]
    found = images_of(cache.pool, entries, jnp.asarray(batch.image_id))
    assert np.abs(found.hidden - expected.hidden).max() < 1e-5
    assert (wide.weight is None, high.weight is None) == (False, False)


def test_what_has_not_been_used_for_the_longest_time_makes_room():
    lru = Lru(2)
    assert [lru.find(b"a"), lru.claim(b"a"), lru.claim(b"b"), lru.find(b"a"), lru.claim(b"c")] == [None, 0, 1, 0, 1]
    assert [b"a" in lru, b"b" in lru, lru.find(b"b")] == [True, False, None]
    assert lru.counts(10) == CacheCounts(hits=1, misses=2, entries=2, capacity=2, bytes=10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_cache": -1}, "image_cache must be at least 0, got -1"),
        ({"image_cache": 4 * IMAGE - 1}, f"holds 3 pictures of {IMAGE:,} bytes each, but a prefill needs 4: allow"),
        ({"prefix_cache": 3 * PREFIX - 1}, f"holds 2 prompts of {PREFIX:,} bytes each, but a prefill needs 3"),
    ],
    ids=str,
)
def test_caches_that_hold_too_little(options, words):
    with pytest.raises(UserError, match=words):
        Engine(model(), 2, max_new_tokens=NEW, buckets=[TWO], prefill_rows=2, **options)


@pytest.mark.parametrize("schedule", [DropSchedule((0,), (0.3,)), DropSchedule((1,), (0.3,), score="v2drop")], ids=str)
def test_a_prefix_that_cannot_be_ranked_again_is_not_kept(schedule):
    config = dataclasses.replace(CONFIG, schedule=schedule)
    other = dataclasses.replace(model(), config=config)
    engine = Engine(other, 2, max_new_tokens=NEW, buckets=[TWO, Bucket(32)], prefix_cache=9 * PREFIX)
    assert engine.caches == {}
