"""Continuous batching: whatever shares the batch, a request is answered as ``generate`` answers it alone."""

import dataclasses
import functools
import itertools
import random
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_generation import BLUE, COMPILED, CONFIG, RED, model

from pdrop_jax.batch import Bucket
from pdrop_jax.errors import UserError
from pdrop_jax.generation.continuous import Engine, EngineFull
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.requests import Request
from pdrop_jax.generation.reuse import Reusable
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.slots import SlotShape, slot_bytes, slot_shape
from pdrop_jax.generation.stopping import StopStream
from pdrop_jax.generation.turns import Turns

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


def test_a_sampled_row_is_drawn_as_alone_whatever_shares_the_batch(engine):
    """Greedy rows among them; each has settings of its own."""
    expected, before = answers(), len(COMPILED)
    settings = [Sampling(8, 1.0, 5, 0.9, 1), Sampling(8, 2.0, seed=2), Sampling(6, 0.5, top_p=0.5, seed=3)]
    asked = list(itertools.product((0, 13), settings))
    handles = [engine.submit(*QUESTIONS[n], sampling) for n, sampling in asked]
    greedy = [engine.submit(*QUESTIONS[n], Sampling(8)) for n in (0, 13)]
    assert [handle.result().token_ids for handle in greedy] == [expected[n][0][:8] for n in (0, 13)]
    found = [handle.result().token_ids for handle in handles]
    assert COMPILED[before:] == []
    for ids, (number, sampling) in zip(found, asked, strict=True):
        prompt, images = QUESTIONS[number]
        assert ids == generate(model(), [prompt], [images], sampling).token_ids[0]


def test_free_slots_forget_their_caches(engine):
    """Or the others would read as far as those had reached, see ``decode_attention.read_sizes``."""
    for handle in [engine.submit(*row, Sampling(3)) for row in QUESTIONS[8:12]]:
        handle.result()
    engine.submit(*QUESTIONS[0], Sampling(LONGEST)).result()
    for lengths in jax.device_get(engine._batch._state.model.lengths):
        assert (lengths > 0).sum() == 1, lengths


def test_pieces_come_while_the_answer_grows(engine):
    pieces, ended = [], threading.Event()
    handle = engine.submit("What is 2?", sampling=Sampling(LONGEST), stream=pieces.append)
    handle.add_done_callback(lambda handle: ended.set())
    assert "".join(handle).strip() == "".join(pieces).strip() == handle.result().text
    assert "".join(handle) == "".join(pieces)  # again from its start
    assert len(pieces) > 1
    assert ended.wait(10)
    assert 0 < handle.result().queue_seconds <= handle.result().first_token_seconds <= handle.result().seconds


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("Say", b"no picture", Sampling(3)), "cannot be read as a picture"),
        (("<image>", None, Sampling(3)), "1 <image> tag but 0 pictures"),
        (("a word" * 40, None, Sampling(3)), r"has \d+ text tokens, but the buckets hold at most 64"),
        (("Say", [RED] * 3, Sampling(3)), "has 3 pictures, but the buckets hold 2"),
        (("Say", None, Sampling(11)), "max_new_tokens is 11, but the engine's slots hold 10"),
        (("a " * 500, None, Sampling(3)), "the model has 256"),
    ],
    ids=["picture", "tags", "text", "pictures", "new tokens", "positions"],
)
def test_requests_that_do_not_fit_are_refused(engine, request_, words):
    with pytest.raises(UserError, match=words):
        engine.submit(*request_)


def test_an_error_of_one_stream_is_its_own(engine):
    def fail(piece):
        raise RuntimeError("broken pipe")

    streams = [None, fail, None]
    handles = [engine.submit(f"What is {n}?", None, Sampling(LONGEST), stream=streams[n]) for n in range(3)]
    for use in (list, lambda handle: handle.result()):
        with pytest.raises(RuntimeError, match="broken pipe"):
            use(handles[1])
    assert [handles[n].result().token_ids for n in (0, 2)] == [answers()[n][0] for n in (0, 2)]


def held(engine, sampling=Sampling(LONGEST)):
    """A request that holds the engine's thread, and what lets it go."""
    begun, go = threading.Event(), threading.Event()

    def hold(piece):
        begun.set()
        assert go.wait(60)

    handle = engine.submit("What is 2?", sampling=sampling, stream=hold)
    assert begun.wait(60)
    return handle, go


def small(**options):
    """An engine whose programs are compiled already."""
    return Engine(model(), 5, max_new_tokens=LONGEST, buckets=BUCKETS, **options)


def test_more_requests_than_may_wait_are_refused():
    with small(max_waiting=2) as engine:
        first, go = held(engine)
        waiting = [engine.submit("What is 2?", sampling=Sampling(3)) for _ in range(2)]
        with pytest.raises(EngineFull, match=r"^2 requests wait already"):
            engine.submit("What is 3?", sampling=Sampling(3))
        assert "1 running, 2 waiting" in repr(engine)
        waiting[0].cancel()
        go.set()
        assert [handle.result().finish_reason for handle in (first, *waiting)] == ["length", "cancelled", "length"]
        assert waiting[0].result().token_ids == []


@pytest.mark.parametrize("cancel", [False, True])
def test_a_closed_engine_leaves_no_thread(cancel):
    engine = small()
    first, go = held(engine)
    others = [engine.submit("What is 2?", sampling=Sampling(LONGEST)) for _ in range(7)]
    closing = threading.Thread(target=engine.close, args=[cancel])
    closing.start()
    while not engine._closing:
        pass
    go.set()
    closing.join()
    reasons = [handle.result(0).finish_reason for handle in (first, *others)]
    assert reasons == (["cancelled"] * 8 if cancel else ["length"] * 8)
    assert engine._thread is not None
    assert not engine._thread.is_alive()
    with pytest.raises(UserError, match="the engine is closed"):
        engine.submit("What?")


def test_an_error_of_the_device_fails_all_that_wait():
    engine = small()
    first, go = held(engine)
    others = [engine.submit("What is 2?", sampling=Sampling(LONGEST)) for _ in range(7)]
    jax.tree.map(lambda x: x.delete(), engine._batch._state)
    go.set()
    for handle in (first, *others):
        with pytest.raises(Exception, match="deleted"):
            handle.result(60)
    with pytest.raises(RuntimeError, match=r"the engine has stopped: .*deleted"):
        engine.submit("What?")
    engine.close()


def test_the_memory_of_slots_is_known_before_it_is_taken(engine):
    """Later stages hold fewer image tokens: a slot takes less than as many layers of the first stage."""
    shape = slot_shape(CONFIG, BUCKETS, LONGEST)
    assert shape == SlotShape(LONGEST, (64 + 32 + LONGEST, 64 + 2 * int(16 * 0.3) + LONGEST))
    taken = sum(x.nbytes for x in jax.tree.leaves(engine._batch._state))
    assert slot_bytes(CONFIG, shape, jnp.float32, 5) == taken == engine.memory
    one = slot_bytes(CONFIG, shape, jnp.float32)
    assert one * 5 == taken
    dense = dataclasses.replace(CONFIG, schedule=dataclasses.replace(CONFIG.schedule, ratios=(1.0,)))
    assert slot_bytes(dense, slot_shape(dense, BUCKETS, LONGEST), jnp.float32) > 1.1 * one
    options = {"max_new_tokens": LONGEST, "buckets": BUCKETS}
    assert Engine(model(), memory=4 * one - 1, **options).slots == 3
    with pytest.raises(UserError, match=f"holds no slot, which takes {one:,}"):
        Engine(model(), memory=one - 1, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"slots": 2, "memory": 10**9}, "pass one of them"),
        ({"max_new_tokens": 256}, "max_new_tokens is 256, but the model has 256 positions"),
        ({"buckets": [], "max_new_tokens": 8}, "at least one bucket"),
        ({"prefill_rows": -1}, "prefill_rows must be at least 1, got -1"),
    ],
    ids=str,
)
def test_engines_that_cannot_be(options, words):
    with pytest.raises(UserError, match=words):
        Engine(model(), **options)


def test_warm_up_comes_first(engine):
    engine.submit("What?", sampling=Sampling(1)).result()
    with pytest.raises(UserError, match="warm_up comes before the first request"):
        engine.warm_up()


class Even:
    """A constraint: tokens of even ids that are not the last one again."""

    def __init__(self):
        self.last = -1

    def accept(self, ids):
        self.last = ids[-1]

    def allowed(self):
        bits = np.arange(CONFIG.text.vocab_size) % 2 == 0
        bits[self.last] = False
        return np.packbits(bits, bitorder="little").view(np.int32)


class Failing(Even):
    def accept(self, ids):
        raise RuntimeError("no such token")


def test_stop_strings_constraints_and_logprobs_of_single_requests():
    """Each request gets what it alone asked for, and the tokens that it would get in an engine without others."""
    text, number = "What is 2?", 2
    ids, _, _ = answers()[number]
    whole = model().processor.decode(ids)
    stop = whole[len(whole) // 2 :][:2]
    with Engine(model(), 5, max_new_tokens=LONGEST, buckets=[Bucket(64)], prefill_rows=1, extras=True) as engine:
        engine.warm_up()
        before, sampling = len(COMPILED), Sampling(LONGEST)
        plain = engine.submit(text, sampling=sampling)
        stopped = engine.submit(text, sampling=sampling, stop=["nowhere", stop])
        even = engine.submit(text, sampling=sampling, constraint=Even())
        failing = engine.submit(text, sampling=sampling, constraint=Failing())
        told = engine.submit(text, sampling=Sampling(LONGEST, 1.0, top_k=1), top_logprobs=3)
        assert plain.result().token_ids == told.result().token_ids == ids
        assert stopped.result().text == "".join(stopped) == whole[: whole.index(stop)]
        assert stopped.result().finish_reason == "stop"
        found = even.result().token_ids
        assert len(found) == LONGEST
        assert all(token % 2 == 0 for token in found)
        assert all(a != b for a, b in itertools.pairwise(found))
        with pytest.raises(RuntimeError, match="no such token"):
            failing.result()
        assert plain.result().logprobs is None
        logprobs = told.result().logprobs
        assert [each.token_id for each in logprobs] == ids
        assert all(each.top[0] == (each.token_id, each.logprob) for each in logprobs)
        assert COMPILED[before:] == []
        with pytest.raises(UserError, match=r"top_logprobs must be in 0\.\.20, got 21"):
            engine.submit(text, sampling=sampling, top_logprobs=21)


def test_a_constraint_is_asked_only_about_new_tokens():
    """A state may be read twice between two tokens of a request, while another one's prompt is prefilled."""
    batch = model().processor(["What?"])
    request = Request.of(batch, Sampling(LONGEST), model().processor, Reusable(), constraint=Even())
    assert not request.take([6], stopped=False)
    assert not request.take([6], stopped=False)
    assert (request.ids, request.constraint.last) == ([6], 6)


def test_extras_have_to_be_asked_for(engine):
    for options in ({"top_logprobs": 1}, {"constraint": Even()}):
        with pytest.raises(UserError, match="need an engine that is made with extras=True"):
            engine.submit("What?", sampling=Sampling(1), **options)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["a", "b", "c"], ["bc"], ["a", "", ""]),
        (["a", "b", "d"], ["bc"], ["a", "", "bd"]),
        (["ab", "ab", "ac"], ["abac"], ["", "ab", ""]),
        (["xaby"], ["by", "ab"], ["x"]),
        (["a", ""], ["ab"], ["", "a"]),
        (["ab", "c"], [], ["ab", "c"]),
    ],
    ids=str,
)
def test_no_part_of_a_stop_string_is_shown(pieces, stops, shown):
    class Pieces:
        def put(self, piece):
            return piece

        def end(self):
            return pieces[-1]

    stream = StopStream(Pieces(), stops)
    found = [stream.put(piece) for piece in pieces[:-1]]
    assert [*found, stream.end()] == shown
    assert stream.stopped == any(stop in "".join(pieces) for stop in stops)


def test_engines_take_turns():
    """The first to wait is the first to go, so that none waits for ever."""
    turns, order = Turns(), []

    def work(name):
        for _ in range(3):
            with turns:
                order.append(name)
                time.sleep(0.01)

    threads = [threading.Thread(target=work, args=[name]) for name in "ab"]
    with turns:
        for thread in threads:
            thread.start()
            time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert "".join(order) == "ababab"
