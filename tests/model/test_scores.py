"""Each score against a plain numpy rendering of its definition, and the registry."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GQA, IMAGE_TOKENS, VISION, assert_close, forward, llava_config, make_batch, params_of, row_of

from pdrop_jax.batch import IGNORE, Bucket
from pdrop_jax.config import VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.layers import vision_embedding
from pdrop_jax.model.scores import SCORES, TokenScore, find_score, register_score
from pdrop_jax.model.stacking import restage
from pdrop_jax.model.vision import vision_features
from pdrop_jax.schedule import DropSchedule

BUCKET = Bucket(8, (16, 9))
ROWS = [[1, -16, 4, -9, 6, 7], [1, 9, -3, 5, 11], [1, 2, 3], [1, 8, 4, -16]]  # the last asks from an image token
BATCH = make_batch(ROWS, BUCKET)
VALID = np.arange(BUCKET.slots) < BATCH.length[:, None]
IMAGE = BATCH.image_id > 0
POSITIONS = np.arange(BUCKET.slots)


def config_of(score, layers=(1, 2), ratios=(0.6, 0.3), **more):
    return llava_config(GQA, DropSchedule(layers, ratios, score=score, **more))


def params_for(config):
    """The same weights for every schedule."""
    dense = dataclasses.replace(config, schedule=DropSchedule.none())
    return restage(params_of(dense), dense, config.schedule)


def run(config, batch=BATCH):
    return forward(config, params_for(config), batch, keep_hidden=True)


def layer_inputs():
    """(3, B, S, D): what each layer gets as long as nothing was dropped."""
    return np.asarray(run(config_of("norm", (), ())).layer_inputs[0], np.float64)


def layer_params(n):
    params = params_of(llava_config(GQA, DropSchedule.none()))["stages"]["0"]
    return jax.tree.map(lambda leaf: np.asarray(leaf[n], np.float64), params)


def attention(layer, x, row, seen, positions=None):
    """Softmax of one query row over the keys ``seen`` (S,), mean over heads; without positions no rope."""
    N, K, H = GQA.num_heads, GQA.num_kv_heads, GQA.head_dim
    h = x / np.sqrt((x**2).mean(-1, keepdims=True) + GQA.norm_eps) * layer["attention_norm"]["scale"]
    q, k = (
        np.einsum("TD,DNH->TNH", h, layer["attention"][n]["kernel"]) + layer["attention"][n]["bias"] for n in ("q", "k")
    )
    if positions is not None:
        angle = positions[:, None, None] * GQA.rope_theta ** (-np.arange(0, H, 2) / H)
        turn = np.exp(1j * angle)
        q, k = (
            np.concatenate([(z * turn).real, (z * turn).imag], -1)
            for z in (v[..., : H // 2] + 1j * v[..., H // 2 :] for v in (q, k))
        )
    logits = np.einsum("NH,SNH->NS", q[row], np.repeat(k, N // K, axis=1)) / np.sqrt(H)
    weights = np.where(seen, np.exp(logits - logits[:, seen].max()), 0)
    return (weights / weights.sum(-1, keepdims=True)).mean(0)


def asked(layer, x, rows_of, seen_of=None, positions=POSITIONS):
    """(B, S): the mean over each sample's query rows."""
    out = np.zeros(BATCH.image_id.shape)
    for b in range(len(ROWS)):
        for row in rows_of(b):
            seen = np.arange(BUCKET.slots) <= row
            if seen_of is not None:
                seen &= seen_of[b]
            if seen.any():
                out[b] += attention(layer, x[b], row, seen, positions) / len(rows_of(b))
    return out


def last(b):
    return [BATCH.length[b] - 1]


def text(b):
    return np.flatnonzero(VALID[b] & ~IMAGE[b])


DEFINITIONS = {
    "pyramiddrop": lambda x: asked(layer_params(1), x[1], last),
    "fastv": lambda x: asked(layer_params(0), x[0], last),
    "feather": lambda x: asked(layer_params(1), x[1], last, IMAGE, None) + grid(),
    "v2drop": lambda x: np.sqrt(((x[1] - x[0]) ** 2).sum(-1)),
    "last_text": lambda x: asked(layer_params(1), x[1], lambda b: text(b)[-1:]),
    "all_text": lambda x: asked(layer_params(1), x[1], text),
    "norm": lambda x: np.sqrt((x[1] ** 2).sum(-1)),
    "quota": lambda x: sum(map(among_images, (np.sqrt((x[1] ** 2).sum(-1)), *attention_of_text_and_images(x)))),
}


def attention_of_text_and_images(x):
    return (asked(layer_params(1), x[1], rows) for rows in (text, lambda b: np.flatnonzero(IMAGE[b])))


def among_images(values):
    """Clipped to the 10th and 90th percentile of each row's image tokens, which become 0 and 1; 0 if all are alike."""
    out = np.zeros(values.shape)
    for b in np.flatnonzero(IMAGE.any(1)):
        low, high = np.percentile(values[b][IMAGE[b]], [10, 90])
        out[b] = (np.clip(values[b], low, high) - low) / max(high - low, 1e-9)
    return out


def grid():
    """Rows and columns 0 and 3 of an image's 4 x 4 tokens."""
    tokens = np.isin(np.arange(IMAGE_TOKENS), [0, 3, 12, 15])
    return np.where(BATCH.feature_index[..., 0] >= 0, tokens[BATCH.feature_index[..., 0] % IMAGE_TOKENS], 0)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_first_drop(name):
    scores = run(config_of(name)).drops[0].scores
    expected = DEFINITIONS[name](layer_inputs())
    assert np.abs(expected[IMAGE]).max() > 1e-3
    atol = 1e-4 if name == "quota" else 2e-6  # differences of small numbers are stretched to 0..1
    assert_close(np.where(IMAGE, scores, 0), np.where(IMAGE, expected, 0), atol=atol)


def test_feather_keeps_the_grid_at_the_first_drop_only():
    first, second = run(config_of("feather")).drops
    protected = np.asarray(grid() > 0)
    assert np.asarray(first.keep)[0][protected[0]].all()
    assert np.asarray(second.scores).max() <= 1


@pytest.mark.parametrize("name", ["fastv", "v2drop"])
def test_the_last_layer_is_that_of_the_stage_that_ran(name):
    """The second drop, over what the first one left."""
    out = run(config_of(name))
    once = run(config_of(name, (1,), (0.6,)))
    x = np.asarray(once.layer_inputs[1], np.float64)  # inputs of layers 1 and 2
    for b in range(2):
        n, image = int(once.lengths[1][b]), np.asarray(out.drops[1].image_id[b]) > 0
        if name == "v2drop":
            expected = np.sqrt(((x[1, b] - x[0, b]) ** 2).sum(-1))
        else:
            slots = np.arange(x.shape[2])
            expected = attention(layer_params(1), x[0, b], n - 1, slots < n, slots)
        assert_close(out.drops[1].scores[b][image], expected[image], atol=2e-6)


def test_all_text_asks_no_target():
    labels = np.where(np.arange(BUCKET.slots) == BATCH.length[:, None] - 1, 7, IGNORE).astype(np.int32)
    batch = dataclasses.replace(BATCH, labels=labels, query_rows=BATCH.length[:, None] - 2)
    scores = run(config_of("all_text"), batch).drops[0].scores
    expected = asked(layer_params(1), layer_inputs()[1], lambda b: [s for s in text(b) if s != BATCH.length[b] - 1])
    assert_close(np.where(IMAGE, scores, 0), np.where(IMAGE, expected, 0), atol=2e-6)


def test_random_is_seeded_and_a_rows_own():
    first = run(config_of("random")).drops
    assert all((a.keep == b.keep).all() for a, b in zip(first, run(config_of("random")).drops, strict=True))
    assert any((a.keep != b.keep).any() for a, b in zip(first, run(config_of("random", seed=1)).drops, strict=True))
    wide = make_batch(ROWS[:1], Bucket(20, (16, 16)))
    drawn = first[0].scores[0][IMAGE[0]]
    assert_close(run(config_of("random"), wide).drops[0].scores[0][wide.image_id[0] > 0], drawn, atol=0)
    assert_close(run(config_of("random"), row_of(BATCH, 0)).drops[0].scores[0][IMAGE[0]], drawn, atol=0)
    assert 0.3 < drawn.mean() < 0.7
    assert len(np.unique(drawn)) == IMAGE[0].sum()
    other = make_batch([[1, -16, 4, -9, 6, 8]], BUCKET)
    assert (run(config_of("random"), other).drops[0].scores[0][IMAGE[0]] != drawn).any()


def test_none_leaves_the_text():
    out = run(config_of("none", (1,), (0.0,)))
    assert out.lengths[1].tolist() == (VALID & ~IMAGE).sum(1).tolist()
    with pytest.raises(UserError, match=r"score 'none' drops all image tokens: its ratios must be 0, got \[0.5\]"):
        DropSchedule((1,), (0.5,), score="none")


@pytest.mark.parametrize("layers", [(0,), (0, 2)])
def test_cls_is_the_towers_attention(layers):
    config = config_of("cls", layers, (0.5, 0.25)[: len(layers)])
    params, tower = params_for(config), params_for(config)["vision"]
    first = forward(config, params, BATCH, keep_hidden=True).drops[0]
    layer = jax.tree.map(lambda x: np.asarray(x[-1], np.float64), tower["layers"])
    for b in range(2):
        for m in range(int(BATCH.image_id[b].max())):
            pixels = BATCH.crops[b, m][None]
            # The one layer that runs gets what is embedded.
            x = np.asarray(vision_embedding(VISION, tower["embed"], jnp.asarray(pixels))[0], np.float64)
            h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + VISION.norm_eps)
            h = h * layer["attention_norm"]["scale"] + layer["attention_norm"]["bias"]
            q, k = (
                np.einsum("TD,DNH->TNH", h, layer["attention"][n]["kernel"]) + layer["attention"][n]["bias"]
                for n in ("q", "k")
            )
            logits = np.einsum("NH,TNH->NT", q[0], k) / np.sqrt(VISION.head_dim)
            weights = np.exp(logits - logits.max())
            expected = (weights / weights.sum(-1, keepdims=True)).mean(0)[1:]
            of_image = BATCH.image_id[b] == m + 1
            assert_close(first.scores[b][of_image], expected[: of_image.sum()], atol=2e-6)


def test_given_scores_choose():
    config = config_of("given")
    scores = np.random.default_rng(0).random(BATCH.image_id.shape).astype(np.float32)
    out = run(config, dataclasses.replace(BATCH, scores=scores))
    of_image = BATCH.image_id[0] == 1
    best = np.sort(np.argsort(-scores[0][of_image])[: int(16 * 0.6)])
    assert np.flatnonzero(np.asarray(out.drops[0].keep)[0][of_image]).tolist() == best.tolist()
    with pytest.raises(UserError, match=r"score 'given' needs Batch\.scores"):
        run(config)


def test_every_score_is_rendered_here():
    assert set(SCORES) == {*DEFINITIONS, "random", "none", "cls", "given"}


def test_a_score_of_the_users(monkeypatch):
    monkeypatch.setattr("pdrop_jax.model.scores.SCORES", dict(SCORES))
    register_score("first", lambda at: -at.buffer.index.astype(jnp.float32))
    register_score(
        "whole",
        TokenScore(lambda at: at.buffer.precomputed_scores, precompute=lambda config, batch, attention: batch.image_id),
    )
    keep = np.asarray(run(config_of("first")).drops[0].keep)[1]
    assert keep[IMAGE[1]].tolist() == [True, False, False]
    run(config_of("whole"))
    with pytest.raises(UserError, match="score 'first' is already registered"):
        register_score("first", lambda at: at.buffer.index)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("pyramidrop"), "unknown score 'pyramidrop': did you mean 'pyramiddrop'?"),
        (config_of("zzz"), f"unknown score 'zzz': one of {', '.join(SCORES)}"),
        (
            config_of("v2drop", (0, 2)),
            "score 'v2drop' needs the layer before a drop, and there is none before layer 0",
        ),
        (
            dataclasses.replace(config_of("cls"), vision=VisionConfig(16, 4, 16, 24, 2, 2, kind="siglip")),
            "score 'cls' needs a class token, and a siglip tower has none",
        ),
    ],
)
def test_bad_scores(config, message):
    with pytest.raises(UserError) as error:
        find_score(config)
    assert str(error.value) == message


def test_no_gradient_flows_through_a_score(monkeypatch):
    monkeypatch.setattr("pdrop_jax.model.scores.SCORES", dict(SCORES))
    register_score("sum", lambda at: at.buffer.hidden.sum(-1))
    config = config_of("sum")
    params = params_for(config)
    total = jax.jit(jax.grad(lambda p: sum(d.scores.sum() for d in forward(config, p, BATCH).drops)))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(total(params)))


def test_the_schedule_keeps_its_score():
    schedule = DropSchedule((1,), (0.5,), score="random", seed=3)
    assert DropSchedule.from_json(schedule.to_json()) == schedule
    assert "score" not in DropSchedule().to_json()


def test_the_tower_is_the_same_with_and_without_its_attention():
    config = config_of("cls")
    pixels = jnp.asarray(BATCH.crops[0])
    features, attention_of, _ = vision_features(config, params_for(config)["vision"], pixels, class_attention=True)
    assert_close(features, vision_features(config, params_for(config)["vision"], pixels)[0], atol=0)
    assert_close(attention_of.sum(-1), np.ones(2), atol=1e-6)
