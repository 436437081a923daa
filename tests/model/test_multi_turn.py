"""Turns of a conversation on the cache of those before, beside runs without any cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    GQA,
    MHA,
    TWO_DROPS,
    assert_close,
    decode_step,
    forward,
    llava_config,
    make_batch,
    params_of,
    prefill,
    row_of,
)

from pdrop_jax.batch import Bucket
from pdrop_jax.model import multi_turn, vlm
from pdrop_jax.model.cache import empty_caches, grow, write_tokens
from pdrop_jax.model.decoder import DecodeState, positions_of, run_stages
from pdrop_jax.model.drop import Boundary, TokenBuffer, drop, pyramiddrop_score
from pdrop_jax.model.layers import layer_of
from pdrop_jax.model.rope import rope_tables
from pdrop_jax.schedule import DropSchedule

# Three conversations of three turns, each turn a row: a negative number is an image of that many tokens.
CHUNKS = [
    [[1, -8, 4], [1, 9, -3, 5], [1, 2, 3, 4, 5]],
    [[5, 6], [6, 7, 8, 9], [11, -5, 12]],
    [[-5, 7, 21], [22, -4, 23], [24]],
]
CONFIGS = {
    "gqa_original_positions": llava_config(GQA, dataclasses.replace(TWO_DROPS, positions="original")),
    "layer_0": llava_config(MHA, DropSchedule((0, 2), (0.5, 0.3))),
    "dense": llava_config(MHA, DropSchedule.none()),
}
ROOM = 48  # slots of every cache

keep = jax.jit(multi_turn.keep, static_argnames=("config", "slots"))
rerank = jax.jit(multi_turn.rerank, static_argnames=("config", "new_slots"))


CHUNK, WHOLE = Bucket(6, (8,)), Bucket(20, (8, 8, 8))  # one for all turns, so that each function compiles once


def whole_at(turn):
    """The conversations up to ``turn``, each as one row."""
    return make_batch([[item for chunk in CHUNKS[: turn + 1] for item in chunk[b]] for b in range(3)], WHOLE)


def chunk_at(turn):
    """The rows of ``turn`` alone, with the pictures that they have in ``whole_at``."""
    batch = make_batch(CHUNKS[turn], CHUNK)
    crops = whole_at(turn).crops
    for b in range(3):
        before = sum(item < 0 for chunk in CHUNKS[:turn] for item in chunk[b])
        batch.crops[b, 0] = crops[b, min(before, 2)]
    return batch


def nothing(config):
    caches = [cache and grow(cache, ROOM) for cache in empty_caches(config, 3, jnp.float32)]
    return DecodeState(tuple(caches), (jnp.zeros(3, jnp.int32),) * len(caches))


def rerank_turns(config, params):
    """(logits, state, drops) of each turn."""
    state, first = nothing(config), multi_turn.FirstStage(jnp.zeros((3, ROOM, config.text.hidden_size)))
    for turn in range(3):
        logits, state, first, drops = rerank(
            config,
            params,
            chunk_at(turn),
            whole_at(turn),
            state.caches[0] and grow(state.caches[0], ROOM),
            state.lengths[0],
            first,
            new_slots=4,
        )
        yield logits, state, drops


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_rerank_is_the_prefill_of_the_whole_conversation(config):
    params = params_of(config)
    for turn, (logits, state, drops) in enumerate(rerank_turns(config, params)):
        expected, after, chosen = prefill(config, params, whole_at(turn), new_slots=4)
        assert_close(logits, expected, atol=1e-5)
        assert np.array_equal(state.lengths, after.lengths)
        assert len(drops) == len(chosen) == len(config.schedule.layers)
        for ours, theirs in zip(drops, chosen, strict=True):
            assert np.array_equal(ours.keep, theirs.keep)
            assert np.array_equal(ours.image_id, theirs.image_id)
            assert_close(ours.scores * ours.keep, theirs.scores * theirs.keep, atol=1e-5)


def test_tokens_decoded_after_rerank_are_those_after_a_prefill():
    config = CONFIGS["gqa_original_positions"]
    params = params_of(config)
    *_, (_, state, _) = rerank_turns(config, params)
    _, after, _ = prefill(config, params, whole_at(2), new_slots=4)
    for step, tokens in enumerate(np.array([[31, 32, 33], [41, 42, 43]], np.int32)):
        ours, state = decode_step(config, params, tokens, state, jnp.int32(step))
        theirs, after = decode_step(config, params, tokens, after, jnp.int32(step))
        assert_close(ours, theirs, atol=1e-5)


def keep_turns(config, params):
    state = nothing(config)
    for turn in range(3):
        logits, state, drops = keep(config, params, chunk_at(turn), state, WHOLE.slots)
        yield logits, state, drops


def test_later_text_reads_what_the_first_question_left():
    """A text turn behind a turn with images is the whole forward pass, ranked by the first question."""
    config = CONFIGS["gqa_original_positions"]
    params = params_of(config)
    first = chunk_at(0)
    _, state, _ = keep(config, params, first, nothing(config), WHOLE.slots)
    logits, _, _ = keep(config, params, make_batch([[5, 6], [6, 7, 8, 9], [13]], CHUNK), state, WHOLE.slots)
    rows = [[1, -8, 4, 5, 6], [1, 9, -3, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 13]]
    whole = make_batch(rows, Bucket(8, (8,)), query_rows=first.query_rows)
    out = forward(config, params, dataclasses.replace(whole, crops=first.crops))
    for b, n in enumerate(out.buffer.length):
        assert_close(logits[b], out.logits[b, n - 1], atol=1e-5)


def packed(tokens, image_id, image_tokens):
    """Tokens (hidden, index) in a buffer of ROOM slots; the last one asks. An image had ``image_tokens`` at first."""
    hidden, index = tokens
    n = len(index)

    def pad(x):
        return np.pad(x, [(0, ROOM - n)] + [(0, 0)] * (x.ndim - 1))[None]

    count, query = np.array([[0, image_tokens]], np.int32), np.array([[n - 1]], np.int32)
    return TokenBuffer(pad(hidden), pad(image_id), pad(index), np.array([n], np.int32), query, count)


def joined(parts):
    return tuple(np.concatenate(x) for x in zip(*parts, strict=True))


def without_cache(config, params, row):
    """Last logits, and the kept image tokens of each boundary by their slots, when every stage sees its tokens anew.

    At a boundary one turn after the other chooses among its own image tokens, behind what the turns before it kept.
    """
    parts, image_ids = [], []  # of each turn: (hidden (n, D), index (n,)), and image_id (n,)
    for turn in range(3):
        chunk = row_of(chunk_at(turn), row)
        n, before = int(chunk.length[0]), sum(len(x) for x in image_ids)
        hidden = np.asarray(embed(config, params, chunk, chunk.bucket.slots).hidden)
        parts.append((hidden[0, :n], (before + np.arange(n)).astype(np.int32)))
        image_ids.append(chunk.image_id[0, :n])
    kept, image_tokens = [], [int(x.sum()) for x in image_ids]
    for s, stage in enumerate(config.schedule.plan(config.text.num_layers, Bucket(ROOM))):
        layers = params["stages"][str(s)]
        if s:
            chosen = []
            for n, (part, image_id) in enumerate(zip(parts, image_ids, strict=True)):
                old = sum(len(index) for _, index in chosen)
                before = np.pad(image_id, (old, 0))  # what was kept stays, as text does
                asked = packed(joined([*chosen, part]), before, image_tokens[n])
                rope = rope_tables(config.text, positions_of(config.schedule, asked))
                at = Boundary(config, s - 1, asked, rope, layer_of(layers, 0))
                keep = np.asarray(drop_(stage, at, pyramiddrop_score, 8)[1].keep[0])
                stays = keep[old : old + len(image_id)]
                chosen.append(tuple(x[stays] for x in part))
                image_ids[n] = image_id[stays]
            parts = chosen
            kept.append([i for (_, index), m in zip(parts, image_ids, strict=True) for i in index[m > 0].tolist()])
        buffer = packed(joined(parts), np.concatenate(image_ids), 0)
        hidden = run(config, {"0": layers}, (stage,), buffer)
        ends = np.cumsum([0, *map(len, image_ids)])
        parts = [(hidden[a:b], index) for a, b, (_, index) in zip(ends, ends[1:], parts, strict=False)]
    last = parts[-1][0][None, -1:]
    return vlm.unembed(config, params, vlm.final_norm(config, params, last))[0, 0], kept


embed = jax.jit(vlm.embed, static_argnames=("config", "slots"))
drop_ = jax.jit(drop, static_argnames=("stage", "score", "max_count"))


@functools.partial(jax.jit, static_argnames=("config", "plan"))
def run(config, stages, plan, buffer):
    return run_stages(config, stages, plan, buffer, ()).buffer.hidden[0]


@pytest.mark.parametrize("config", [CONFIGS["gqa_original_positions"], CONFIGS["layer_0"]], ids=["original", "layer_0"])
def test_images_of_a_later_turn_are_chosen_behind_what_was_kept(config):
    params = params_of(config)
    kept = [[[] for _ in config.schedule.layers] for _ in range(3)]
    starts = np.zeros(3, int)  # of the turn, in slots of the conversation
    for turn, (_, _, drops) in enumerate(keep_turns(config, params)):
        for s, d in enumerate(drops):
            for b in range(3):
                stays = np.asarray(d.index[b])[np.asarray(d.keep[b]) & (np.asarray(d.image_id[b]) > 0)]
                kept[b][s] += (starts[b] + stays).tolist()
        starts += chunk_at(turn).length
    *_, (logits, state, _) = keep_turns(config, params)
    for b in range(3):
        expected, chosen = without_cache(config, params, b)
        assert kept[b] == chosen
        assert_close(logits[b], expected, atol=1e-5)
    assert np.array_equal(state.lengths[0], starts)


def test_keep_and_rerank_differ_once_something_was_dropped():
    config = CONFIGS["layer_0"]
    kept, reranked = ([x[0] for x in of(config, params_of(config))] for of in (keep_turns, rerank_turns))
    assert_close(kept[0], reranked[0], atol=1e-5)
    assert np.abs(kept[2] - reranked[2])[0].max() > 1e-3


def test_padding_of_a_chunk_may_reach_beyond_the_cache():
    (cache,) = empty_caches(llava_config(MHA, DropSchedule.none()), 2, jnp.float32)
    k, v = np.random.default_rng(0).standard_normal((2, 2, 4, MHA.num_kv_heads, MHA.head_dim)).astype(np.float32)
    written = write_tokens(grow(cache, 6), 1, k, v, jnp.array([1, 4]))
    for ours, x in ((written.k, k), (written.v, v)):
        expected = np.zeros(ours.shape, np.float32)
        expected[1, 0, :, 1:5] = x[0].swapaxes(0, 1)
        expected[1, 1, :, 4:6] = x[1, :2].swapaxes(0, 1)
        assert np.array_equal(ours, expected)
