"""Properties of one drop: which image tokens are scored how, which stay, and where they go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import GQA, MHA, assert_close, llava_config, make_batch, make_buffer, params_of

from pdrop_jax.batch import Bucket
from pdrop_jax.model.decoder import positions_of
from pdrop_jax.model.drop import attention_scores, compact, select_tokens
from pdrop_jax.model.rope import rope_tables
from pdrop_jax.schedule import DropSchedule

BUCKET = Bucket(6, (8, 5))  # B and the bucket never change, so that each ratio is compiled once
B = 3
ratios = st.sampled_from([0.0, 0.29, 0.6, 1.0])


@st.composite
def row(draw):
    """Up to two images of any size anywhere before the last text token."""
    items = draw(st.lists(st.integers(1, 9), min_size=1, max_size=BUCKET.text))
    sizes = [draw(st.integers(1, size)) for size in BUCKET.images[: draw(st.integers(0, 2))]]
    places = sorted(draw(st.integers(0, len(items) - 1)) for _ in sizes)
    for place, size in reversed(list(zip(places, sizes, strict=True))):
        items.insert(place, -size)
    return items


@st.composite
def buffers(draw):
    labels = np.arange(B * BUCKET.slots, dtype=np.int32).reshape(B, -1)
    return make_buffer(make_batch([draw(row()) for _ in range(B)], BUCKET, labels=labels))


def scores_of(config, layer, buffer, rope):
    return attention_scores(config, layer, buffer.hidden, buffer.query_rows, rope)


def few_values():
    """Scores (B, S) with many ties."""
    size = B * BUCKET.slots
    values = st.lists(st.sampled_from([0.0, 0.125, 0.5]), min_size=size, max_size=size)
    return values.map(lambda x: np.array(x, np.float32).reshape(B, -1))


@jax.jit(static_argnames="ratio")
def drop(buffer, scores, ratio):
    keep = select_tokens(buffer, scores, ratio, max(BUCKET.images))
    return keep, compact(buffer, keep, BUCKET.text + sum(int(n * ratio) for n in BUCKET.images))


def plain_choice(buffer, scores, ratio):
    """``choose`` as one would write it for a single row: sort each image's tokens, take the first, mark them."""
    keep = np.zeros(scores.shape, bool)
    for b in range(len(scores)):
        for slot in range(buffer.length[b]):
            keep[b, slot] = buffer.image_id[b, slot] == 0
        for m in range(1, buffer.image_count.shape[1]):
            tokens = [slot for slot in range(buffer.length[b]) if buffer.image_id[b, slot] == m]
            best = sorted(tokens, key=lambda slot: (-scores[b, slot], slot))
            keep[b, best[: int(buffer.image_count[b, m] * ratio)]] = True
    return keep


@given(buffers(), few_values(), ratios)
def test_the_best_stay_and_ties_go_to_the_lower_slot(buffer, scores, ratio):
    keep, _ = drop(buffer, scores, ratio)
    np.testing.assert_array_equal(keep, plain_choice(buffer, scores, ratio))


@given(buffers(), few_values(), ratios)
def test_every_image_keeps_exactly_its_own_count(buffer, scores, ratio):
    keep, _ = drop(buffer, scores, ratio)
    for m in (1, 2):
        kept = (np.asarray(keep) & (buffer.image_id == m)).sum(1)
        assert kept.tolist() == [int(n * ratio) for n in buffer.image_count[:, m]]


@given(buffers(), few_values(), ratios)
def test_text_is_never_dropped_and_padding_never_kept(buffer, scores, ratio):
    keep, _ = drop(buffer, scores, ratio)
    valid = np.arange(BUCKET.slots) < buffer.length[:, None]
    assert np.asarray(keep)[valid & (buffer.image_id == 0)].all()
    assert not np.asarray(keep)[~valid].any()


@given(buffers(), few_values(), ratios)
def test_everything_moves_together_and_in_order(buffer, scores, ratio):
    keep, after = drop(buffer, scores, ratio)
    for b in range(B):
        stays, n = np.flatnonzero(keep[b]), after.length[b]
        for name in ("hidden", "image_id", "index", "labels"):
            np.testing.assert_array_equal(getattr(after, name)[b, :n], getattr(buffer, name)[b, stays])


@given(buffers(), few_values(), ratios)
def test_what_lies_behind_the_length_is_padding(buffer, scores, ratio):
    _, after = drop(buffer, scores, ratio)
    behind = np.arange(after.slots) >= np.asarray(after.length)[:, None]
    assert (np.asarray(after.image_id)[behind] == 0).all()
    assert (np.asarray(after.labels)[behind] == -100).all()


@given(buffers(), few_values(), ratios)
def test_a_query_row_follows_its_token(buffer, scores, ratio):
    _, after = drop(buffer, scores, ratio)
    index = np.take_along_axis(np.asarray(after.index), np.asarray(after.query_rows), axis=1)
    np.testing.assert_array_equal(index, buffer.query_rows)


@given(buffers(), few_values(), few_values())
def test_a_second_drop_counts_from_the_original_size(buffer, scores, later_scores):
    _, after = drop(buffer, scores, 0.6)
    keep = select_tokens(after, later_scores[:, : after.slots], 0.29, max(BUCKET.images))
    for m in (1, 2):
        kept = (keep & (after.image_id == m)).sum(1)
        assert kept.tolist() == [int(n * 0.29) for n in buffer.image_count[:, m]]


@given(buffers(), few_values(), ratios)
def test_a_row_is_dropped_as_if_it_were_alone(buffer, scores, ratio):
    keep, _ = drop(buffer, scores, ratio)
    alone, _ = drop(jax.tree.map(lambda x: x[1:2], buffer), scores[1:2], ratio)
    np.testing.assert_array_equal(keep[1:2], alone)


def test_the_documented_example_of_compaction():
    buffer = make_buffer(make_batch([[1, -3, 2]], Bucket(3, (3,))))
    after = compact(buffer, np.array([[True, False, True, True, False, False]]), 4)
    assert after.length.tolist() == [3]
    assert after.index[0, :3].tolist() == [0, 2, 3]


def test_a_dropped_query_row_passes_to_the_last_kept_token_before_it():
    # As in plain pretraining: <bos> <image> caption, ranked by the last image token, slot 4.
    buffer = make_buffer(make_batch([[1, -4, 7, 8]], Bucket(3, (4,)), query_rows=[[4, -1]]))
    after = compact(buffer, np.array([[True, True, True, False, False, True, True]]), 5)
    assert after.query_rows.tolist() == [[2, -1]]


def test_dense_positions_are_renumbered_and_original_ones_are_kept():
    buffer = make_buffer(make_batch([[1, -4, 7]], Bucket(2, (4,))))
    after = compact(buffer, np.array([[True, False, True, False, True, True]]), 4)
    assert positions_of(DropSchedule((1,), (0.5,), "dense"), after).tolist() == [[0, 1, 2, 3]]
    assert positions_of(DropSchedule((1,), (0.5,), "original"), after).tolist() == [[0, 2, 4, 5]]


def plain_scores(config, layer, buffer, positions):
    """The paper's score for one row at a time: attention of the next layer, mean over heads and query rows."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    attention = jax.tree.map(lambda x: np.asarray(x, np.float64), layer["attention"])
    out = np.zeros(buffer.image_id.shape)

    def project(x, name):
        return np.einsum("TD,DNH->TNH", x, attention[name]["kernel"]) + attention[name].get("bias", 0)

    def turned(x, at):
        angle = at[:, None, None] * config.rope_theta ** (-np.arange(0, H, 2) / H)
        a, b = x[..., : H // 2], x[..., H // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    for b, rows in enumerate(buffer.query_rows):
        n = buffer.length[b]
        x = buffer.hidden[b, :n].astype(np.float64)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * layer["attention_norm"]["scale"]
        q, k = turned(project(x, "q"), positions[b, :n]), turned(project(x, "k"), positions[b, :n])
        k = np.repeat(k, N // K, axis=1)
        used = [r for r in rows if r >= 0]
        for r in used:
            logits = np.einsum("NH,SNH->NS", q[r], k[: r + 1]) / np.sqrt(H)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, : r + 1] += (weights / weights.sum(-1, keepdims=True)).mean(0) / len(used)
    return out


def ranked_buffer():
    rows = [[1, -8, 4, -5, 6, 7, 8], [1, -3, 5], [1, 2, 3, 4]]
    return make_buffer(make_batch(rows, BUCKET, query_rows=[[17, 9], [4, -1], [3, -1]]), D=32)


def next_layer(text):
    return jax.tree.map(lambda x: x[0], params_of(llava_config(text))["stages"]["1"])


@pytest.mark.parametrize("text", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("stride", [1, 3], ids=["dense", "original"])
def test_scores_are_the_attention_of_the_next_layer(text, stride):
    buffer, positions = ranked_buffer(), stride * np.tile(np.arange(BUCKET.slots), (B, 1))
    ours = scores_of(text, next_layer(text), buffer, rope_tables(text, positions))
    valid = np.arange(BUCKET.slots) < buffer.length[:, None]
    expected = plain_scores(text, next_layer(text), buffer, positions)
    assert_close(np.where(valid, ours, 0), expected, atol=1e-6)


def test_scores_of_a_row_add_up_to_one():
    buffer = ranked_buffer()
    assert_close(scores_of(MHA, next_layer(MHA), buffer, rope_tables(MHA, buffer.index)).sum(1), np.ones(B), atol=1e-6)


def test_scores_of_a_bfloat16_model_are_float32():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (next_layer(MHA), ranked_buffer().hidden))
    buffer = dataclasses.replace(ranked_buffer(), hidden=half[1])
    scores = scores_of(MHA, half[0], buffer, rope_tables(MHA, buffer.index))
    assert scores.dtype == jnp.float32
    assert_close(scores.sum(1), np.ones(B), atol=1e-6)


def test_no_gradient_flows_through_the_ranking():
    buffer = ranked_buffer()

    def total(hidden, layer):
        scores = scores_of(MHA, layer, dataclasses.replace(buffer, hidden=hidden), rope_tables(MHA, buffer.index))
        return (scores**2).sum()

    gradients = jax.grad(total, argnums=(0, 1))(buffer.hidden, next_layer(MHA))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))
