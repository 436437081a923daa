"""Effects of a change on answers, and how sure they are."""

import numpy as np
import pytest

from pdrop_jax.analysis.dose import equivalent_sizes
from pdrop_jax.analysis.effects import Effect, average, beyond, flipped, mean_of, right
from pdrop_jax.analysis.metrics import jsd, kl


def effect(flips, divergences):
    return Effect([""] * len(flips), np.asarray(flips, float), np.asarray(divergences), np.asarray(divergences) / 2)


def test_the_divergences_of_two_coins():
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [0.9, 0.1]])
    assert kl(p, q) == pytest.approx([0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), 0.0])
    assert jsd(p, q) == pytest.approx((kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2)
    assert jsd(np.eye(2), np.eye(2)[::-1]) == pytest.approx([np.log(2)] * 2)


def test_answers_are_compared_question_by_question():
    assert flipped(["bag", "2", "coat"], ["bag", "3", "Coat"]).tolist() == [0, 1, 1]
    assert right([" bag ", "3", "Coat"], ["bag", "2", "coat"]).tolist() == [1, 0, 1]


def test_draws_are_averaged():
    found = average([effect([0, 1], [0.0, 0.2]), effect([1, 1], [0.1, 0.4])])
    assert found.flipped.tolist() == [0.5, 1]
    assert found.kl == pytest.approx([0.05, 0.3])
    assert found.right is None


def test_the_dose_of_an_effect():
    """Rewordings of 10, 20 and 40 % change 10, 30 and 20 % of the answers: the response never falls."""
    n = 1000
    first = np.arange(n) / n
    sizes = [np.full(n, size) for size in (40.0, 10.0, 20.0)]
    doses = [(first < share).astype(float) for share in (0.2, 0.1, 0.3)]
    effects = [(first < share).astype(float) for share in (0.0, 0.05, 0.2, 0.3, 0.31)]
    found = equivalent_sizes(effects, sizes, doses, range(n))
    assert [x.value for x in found] == pytest.approx([0, 5, 15, 20, np.inf])
    assert found[2].low < 15 < found[2].high
    assert (found[0].low, found[0].high) == (0, 0)
    assert (found[4].low, found[4].high) == (20 if found[4].low < 21 else np.inf, np.inf)


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
    noise = effect(rng.random(400) < 0.1, np.abs(rng.normal(0, 0.01, 400)))
    large = effect(rng.random(400) < 0.4, np.abs(rng.normal(0, 0.01, 400)))
    assert beyond(large, noise, range(400)) == (True, False)
    assert beyond(noise, noise, range(400)) == (False, False)
