"""Effects of a change on answers, and how sure they are."""

import numpy as np
import pytest

from pdrop_jax.analysis.effects import Answers, Effect, beyond, divergence, effect_of, mean_of


def answers(texts, logits):
    logits = np.asarray(logits, np.float32)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return Answers(texts, log_probs, [[]] * len(texts), [[]] * len(texts))


def test_the_divergence_of_two_coins():
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [0.9, 0.1]])
    expected = [0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), 0.0]
    assert divergence(np.log(p), np.log(q)) == pytest.approx(expected)


def test_an_effect_is_counted_question_by_question():
    reference, changed = answers(["bag", "2", "coat"], np.eye(3)), answers(["bag", "3", "Coat"], np.eye(3)[[0, 2, 2]])
    effect = effect_of(reference, changed, ["bag", "2", "coat"])
    assert effect.flipped.tolist() == [0, 1, 1]
    assert effect.right.tolist() == [1, 0, 1]
    assert effect.kl[[0, 2]] == pytest.approx([0, 0])
    assert effect.kl[1] > 0.1
    assert effect_of(reference, changed, None).right is None


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """Of 300 samples of 40 clusters of five alike questions; one that took them for 200 would cover 60 %."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 5)
    covered = 0
    for sample in range(300):
        values = np.repeat(rng.random(40) < 0.3, 5).astype(float)
        found = mean_of(values, clusters, seed=sample)
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_a_mean_without_spread_has_no_interval():
    found = mean_of(np.zeros(10), range(10))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_what_is_more_than_noise():
    rng = np.random.default_rng(0)
    noise = Effect((rng.random(400) < 0.1).astype(float), np.abs(rng.normal(0, 0.01, 400)), None)
    large = Effect((rng.random(400) < 0.4).astype(float), np.abs(rng.normal(0, 0.01, 400)), None)
    assert beyond(large, noise, range(400)) == (True, False)
    assert beyond(noise, noise, range(400)) == (False, False)
