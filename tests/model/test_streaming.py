"""A stream in a ring of slots, beside the same program on a cache that keeps everything and masks what has left."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CROP, GQA, MHA, TWO_DROPS, assert_close, llava_config, make_batch, params_of

from pdrop_jax.batch import Bucket
from pdrop_jax.model import streaming
from pdrop_jax.model.cache import empty_caches, grow
from pdrop_jax.model.decoder import DecodeState, run_stages
from pdrop_jax.model.drop import TokenBuffer
from pdrop_jax.model.ring import Layout
from pdrop_jax.model.slot_attention import EVERYTHING, Ring
from pdrop_jax.model.vlm import embed, next_logits
from pdrop_jax.schedule import DropSchedule

LAYOUT = Layout(prefix=2, frame=16, standby=0, extent=16, kept=4, window=2, bank=2, text=3)
PREFIX, STANDING, QUESTION = [1, 9], [5, 6, 7], [11, 12, 13, 14]
OFFSETS = np.arange(16, dtype=np.int32)
FRAMES = np.random.default_rng(0).standard_normal((7, 1, 1, CROP, CROP, 3)).astype(np.float32)
CONFIGS = {
    "dense": llava_config(GQA),
    "original": llava_config(MHA, dataclasses.replace(TWO_DROPS, positions="original")),
    "no drops, a sliding window": llava_config(dataclasses.replace(MHA, sliding_window=9), DropSchedule.none()),
}

begin = jax.jit(streaming.begin, static_argnames=("config", "layout", "keeps_images"))
watch = jax.jit(streaming.watch, static_argnames=("config", "layout"), donate_argnames="state")
answer = jax.jit(streaming.answer, static_argnames=("config", "layout", "new_slots"))
run = jax.jit(run_stages, static_argnames=("config", "plan", "image_sizes", "max_positions", "first", "new_slots"))


def text_batch(ids):
    return make_batch([ids], Bucket(len(ids)))


def frame_batch(number):
    batch = make_batch([[-16, *STANDING]], Bucket(len(STANDING), (16,)))
    return dataclasses.replace(batch, crops=FRAMES[number])


@functools.cache
def watched(config, keeps_images, frames):
    """The logits of the answer after so many frames, and the state."""
    params = params_of(config)
    state = begin(config, params, LAYOUT, text_batch(PREFIX), OFFSETS, keeps_images=keeps_images)
    for number in range(frames):
        state = watch(config, params, LAYOUT, state, frame_batch(number), OFFSETS)
    logits, _, _ = answer(config, params, LAYOUT, state, text_batch(QUESTION), OFFSETS, new_slots=4)
    return logits, state


class Masked:
    """The reference: every token of every frame stays in the slot that it was written to, and masks hide what left."""

    def __init__(self, config, keeps_images):
        self.config, self.params = config, params_of(config)
        self.counts = [n for n, _ in LAYOUT.counts(config)][: None if keeps_images else 1]
        self.text = [2 + len(FRAMES) * n for n in self.counts]  # where questions go
        self.sizes = [text + len(QUESTION) for text in self.text]
        empty = empty_caches(config, 1, jnp.float32)
        self.caches = tuple(cache and grow(cache, size) for cache, size in zip(empty, self.sizes, strict=False))
        self.tokens = [np.zeros((len(FRAMES), n), int) for n in self.counts]  # which tokens of a frame a stage has
        self.rank = np.zeros((len(FRAMES), 16), int)
        prefix = self.run(text_batch(PREFIX), [np.arange(2)] * len(self.counts), [], before=0)
        self.first = prefix.buffer.hidden[0]

    def held(self, frames):
        """The numbers of the frames that are held after ``frames``, and how many of them are in the bank."""
        left = max(0, frames - LAYOUT.window)
        return list(range(max(0, left - LAYOUT.bank), frames)), min(left, LAYOUT.bank)

    def visible(self, stage, frames, in_bank):
        """(slot, token) of what is seen of each frame."""
        for place, frame in enumerate(frames):
            tokens, b = self.tokens[stage][frame], LAYOUT.counts(self.config)[stage][1]
            best = np.sort(np.argsort(self.rank[frame][tokens])[:b]) if place < in_bank else np.arange(len(tokens))
            yield 2 + frame * len(tokens) + best, tokens[best]

    def run(self, batch, new_slots, frames, in_bank=0, before=2):
        """The output for the tokens of ``batch``, which see ``frames`` and ``before`` tokens in front of them."""
        plan = self.config.schedule.plan(3, batch.bucket)[: len(self.counts)]
        rings, lengths = [], []
        for stage, size in enumerate(self.sizes):
            order, positions = np.full(size, EVERYTHING), np.zeros(size, int)
            order[:before] = positions[:before] = np.arange(before)
            at = before
            for place, (slots, tokens) in enumerate(self.visible(stage, frames, in_bank)):
                order[slots] = positions[slots] = at + np.arange(len(slots))
                if self.config.schedule.positions == "original":
                    positions[slots] = 2 + place * 16 + tokens
                at += len(slots)
            rings.append(Ring(*(jnp.asarray(x, jnp.int32)[None] for x in (new_slots[stage], order, order, positions))))
            lengths.append(jnp.array([at], jnp.int32))
        past = DecodeState(self.caches, tuple(lengths), before + 16 * len(frames) - lengths[0], rings=tuple(rings))
        buffer = embed(self.config, self.params, batch, plan[0].slots)
        output = run(self.config, self.params["stages"], plan, buffer, batch.bucket.images, past=past)
        self.caches = output.state.caches
        return output

    def watch(self, number):
        frames, in_bank = self.held(number + 1)
        slots = [
            np.r_[2 + number * n + np.arange(n), text + np.arange(len(STANDING))]
            for n, text in zip(self.counts, self.text, strict=True)
        ]
        output = self.run(frame_batch(number), slots, frames[:-1], in_bank)
        kept = [np.arange(16), *(np.asarray(d.index[0])[np.asarray(d.keep[0])] for d in output.drops)]
        for tokens, own in zip(self.tokens, kept, strict=True):
            tokens[number] = own[: tokens.shape[1]]
        return output

    def ask(self, frames):
        return self.run(
            text_batch(QUESTION), [text + np.arange(len(QUESTION)) for text in self.text], *self.held(frames)
        )


@functools.cache
def masked(config, keeps_images, frames):
    """The logits of the answer after so many frames; the bank takes the tokens that the stream has taken."""
    reference = Masked(config, keeps_images)
    hidden = [reference.first]
    for number in range(frames):
        state = watched(config, keeps_images, number + 1)[1]
        reference.rank[number] = np.asarray(state.rank[number % LAYOUT.window])
        hidden.append(reference.watch(number).buffer.hidden[0, :16])
    asked = reference.ask(frames).buffer
    if keeps_images:
        return next_logits(config, reference.params, asked)
    found, in_bank = reference.held(frames)
    tokens = [own for _, own in reference.visible(0, found, in_bank)]
    shown = [hidden[frame + 1][own] for frame, own in zip(found, tokens, strict=True)]
    image_id = np.concatenate([[0, 0], *(np.full(len(x), n) for n, x in enumerate(shown, 1)), [0] * 4])
    places = (2 + 16 * n + own for n, own in enumerate(tokens))
    index = np.concatenate([[0, 1], *places, 2 + 16 * len(found) + np.arange(4)])
    S = len(image_id)
    buffer = TokenBuffer(
        hidden=jnp.concatenate([hidden[0], *shown, asked.hidden[0]])[None],
        image_id=jnp.asarray(image_id, jnp.int32)[None],
        index=jnp.asarray(index, jnp.int32)[None],
        length=jnp.array([S]),
        query_rows=jnp.array([[S - 1]]),
        image_count=jnp.full((1, 5), 16),
    )
    plan = [dataclasses.replace(s, slots=S) for s in LAYOUT.plan(config)]
    output = run(config, reference.params["stages"], tuple(plan), buffer, (16,) * 4, first=1, max_positions=99)
    return next_logits(config, reference.params, output.buffer)


@pytest.mark.parametrize(
    ("name", "keeps_images"), [("dense", True), ("original", False), ("no drops, a sliding window", True)]
)
def test_detaching_is_masking(name, keeps_images):
    """At any time: before the window is full, while the bank fills, and once it has forgotten its first frames."""
    for frames in (1, 3, 7):
        ours = watched(CONFIGS[name], keeps_images, frames)[0]
        assert_close(ours, masked(CONFIGS[name], keeps_images, frames))


def test_a_quantized_cache_is_detached_as_it_is():
    """The slots hold the integers and scales of a cache that keeps everything; nothing held is rounded again."""
    config = CONFIGS["dense"].with_cache_dtype("int8")
    params, reference = params_of(config), Masked(config, True)
    state = begin(config, params, LAYOUT, text_batch(PREFIX), OFFSETS, keeps_images=True)
    for number in range(4):
        state = watch(config, params, LAYOUT, state, frame_batch(number), OFFSETS)
        reference.rank[number] = np.asarray(state.rank[number % LAYOUT.window])
        reference.watch(number)
    frames, in_bank = reference.held(4)
    assert (frames, in_bank) == ([0, 1, 2, 3], 2)
    for stage, (ours, theirs) in enumerate(zip(state.caches, reference.caches, strict=True)):
        n, b = LAYOUT.counts(config)[stage]
        assert ours.k.qvalue.dtype == jnp.int8
        for place, (slots, tokens) in enumerate(reference.visible(stage, frames, in_bank)):
            here = 2 + place * b + np.arange(b) if place < 2 else 2 + 2 * b + (place - 2) * n + np.arange(n)
            np.testing.assert_array_equal(np.asarray(state.tokens[stage])[here], tokens)
            for x, y in ((ours.k, theirs.k), (ours.v, theirs.v)):
                assert_close(x.scale[..., here], y.scale[..., slots], atol=1e-5)
                steps = np.abs(np.int32(x.qvalue[:, :, :, here]) - np.int32(y.qvalue[:, :, :, slots]))
                assert steps.max() <= 1  # two programs may round differently what is halfway
                assert steps.mean() < 0.001


def test_an_answer_is_as_near_to_the_float_caches_as_the_bits_allow():
    """With int8 a step is 7 / 127 of int4's. Keys are rounded twice: as projected, and as turned for a question."""
    exact, *others = (watched(CONFIGS["original"].with_cache_dtype(x), False, 7)[0] for x in (None, "int8", "int4"))
    eight, four = (np.abs(logits - exact).max() for logits in others)
    assert 0 < eight < 0.2 * four


def test_the_bank_takes_what_was_kept_longest():
    """In every stage the best tokens of a frame that has left; what survives all drops is among them."""
    config = CONFIGS["dense"]
    _, state = watched(config, True, 3)
    last, b = LAYOUT.counts(config)[-1]
    assert [n for n, _ in LAYOUT.counts(config)] == [16, 9, 4]
    for slot in range(2):
        window = np.asarray(state.tokens[-1])[2 + 2 * b :][slot * last :][:last]
        assert set(np.asarray(state.rank)[slot][window]) == set(range(last))
    banks = [np.asarray(tokens)[2 : 2 + 4] for tokens in state.tokens]
    assert all((bank == banks[0]).all() for bank in banks)
    assert (np.diff(banks[0]) > 0).all()


@pytest.mark.parametrize(("name", "dtype", "keeps_images"), [("dense", None, True), ("original", "int8", False)])
def test_the_state_is_updated_in_place(name, dtype, keeps_images):
    config = CONFIGS[name].with_cache_dtype(dtype)
    _, state = watched(config, keeps_images, 7)
    state = jax.tree.map(jnp.copy, state)
    program = watch.lower(config, params_of(config), LAYOUT, state, frame_batch(0), OFFSETS).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes == size


GEMMA = dataclasses.replace(MHA, two_way_images=True, full_layers=(1,), sliding_window=24, local_rope_theta=100.0)
QWEN = dataclasses.replace(MHA, mrope_sections=(2, 1, 1))
GRID = np.stack([np.zeros(16), *np.divmod(np.arange(16), 4)], axis=1).astype(np.int32)  # time, row and column


@pytest.mark.parametrize(("text", "keeps_images"), [(GEMMA, True), (QWEN, False)], ids=["gemma", "qwen"])
def test_a_frame_in_the_bank_is_where_it_was(text, keeps_images):
    """A bank that keeps all tokens changes nothing, where positions and windows go by more than the stage's slots."""
    config, mrope, answers = llava_config(text), text.mrope_sections is not None, []
    params = params_of(config)

    def positioned(batch, positions):
        return dataclasses.replace(batch, positions=np.asarray(positions, np.int32)[None]) if mrope else batch

    def line(start, count):
        return np.repeat(np.arange(start, start + count)[:, None], 3, axis=1)

    for window, bank in ((1, 2), (3, 1)):
        extent = 4 if mrope else 16
        layout = dataclasses.replace(LAYOUT, window=window, bank=bank, kept=16, extent=extent)
        offsets = GRID if mrope else OFFSETS
        prefix = positioned(text_batch(PREFIX), line(0, 2))
        state = begin(config, params, layout, prefix, offsets, keeps_images=keeps_images)
        for number in range(3):
            frame = positioned(frame_batch(number), np.concatenate([GRID, line(4, 3)]))
            state = watch(config, params, layout, state, frame, offsets)
        question = positioned(text_batch(QUESTION), line(0, 4))
        answers.append(answer(config, params, layout, state, question, offsets, new_slots=4)[0])
    assert_close(*answers)
