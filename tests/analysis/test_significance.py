"""The tests of a study on synthetic answers, and its power."""

import numpy as np
import pytest
from scipy import stats

from pdrop_jax.analysis.comparison import compare
from pdrop_jax.analysis.effects import Effect
from pdrop_jax.analysis.metrics import label_metrics
from pdrop_jax.analysis.power import power_of, power_table
from pdrop_jax.analysis.significance import bonferroni, directional_regression, paired_bootstrap, paired_t
from pdrop_jax.errors import UserError

STUDIES, QUESTIONS = 400, 60


def test_on_nothing_five_in_a_hundred_alarms_are_false():
    """Two changes with the same effect: of 400 studies, 20 find a difference, plus or minus what chance allows."""
    rng = np.random.default_rng(0)
    found = {"t": 0, "regression": 0, "flip rate": 0, "mutual information": 0}
    for _ in range(STUDIES):
        reference = rng.choice(["yes", "no"], QUESTIONS)
        difficulty = rng.exponential(size=QUESTIONS)  # of a question, which both changes share
        target, baseline = difficulty * rng.exponential(size=(2, QUESTIONS))
        found["t"] += paired_t("JSD", target, baseline).p <= 0.05
        found["regression"] += directional_regression(np.ones(QUESTIONS), target - baseline).p <= 0.05
        flips = rng.random((2, QUESTIONS)) < 0.3
        answers = np.where(flips, np.where(reference == "yes", "no", "yes"), reference)
        labels = [label_metrics(reference.tolist(), changed.tolist(), 500) for changed in answers]
        for name in ("flip rate", "mutual information"):
            found[name] += paired_bootstrap(name, *labels).p <= 0.05
    rates = {name: count / STUDIES for name, count in found.items()}
    assert all(0.025 <= rate <= 0.08 for rate in rates.values()), rates


def effect(rng, share, n=80):
    changed = rng.random(n) < share
    right = np.where(changed, 0.0, 1.0)
    distance = np.where(changed, 0.5, 0.01) + rng.random(n) / 100
    return Effect(np.where(changed, "no", "yes").tolist(), changed * 1.0, distance, distance, right, -distance)


def test_a_large_effect_is_found_and_a_small_one_is_not():
    rng = np.random.default_rng(0)
    reference = Effect(["yes"] * 40 + ["maybe"] * 40, np.zeros(80), np.zeros(80), np.zeros(80), np.tile([1.0, 0.0], 40))
    large, small = compare(reference, [effect(rng, 0.8), effect(rng, 0.1)], {"words": effect(rng, 0.1)})
    significant = [test.metric for test in large["words"] if test.corrected < 0.05]
    assert {"JSD", "KL", "flip rate", "log-probability of the answer"} <= set(significant)
    assert all(test.corrected > 0.05 for test in small["words"] if test.metric in significant)
    assert all(test.corrected == min(1, 2 * test.p) for test in (*large["words"], *small["words"]))
    assert compare(reference, [large], {}) == [{}]


def test_differences_that_are_all_alike():
    ones = np.ones(5)
    for found in (paired_t("KL", ones, 0 * ones), directional_regression(ones, -ones)):
        assert (found.p, found.low, found.high) == (1, found.difference, found.difference)
    assert [test.corrected for test in bonferroni([paired_t("KL", ones, ones)] * 3)] == [1, 1, 1]


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_samples(n):
    with pytest.raises(UserError, match=f"needs at least 2 questions, got {n}: ask more"):
        paired_t("JSD", np.zeros(n), np.zeros(n))
    with pytest.raises(UserError, match="at least 2 questions"):
        directional_regression(np.ones(n), np.zeros(n))


def test_power():
    """Nothing is found in 5 of 100 studies, more with more questions, and as much as by the normal approximation."""
    assert 0.02 <= power_of(400, 0.2, 0.0) <= 0.07
    variance = 0.3 * 0.8 + 0.2 * 0.7 - 0.1**2
    assert power_of(346, 0.2, 0.1) == pytest.approx(stats.norm.sf(1.96 - 0.1 / np.sqrt(variance / 346)), abs=0.03)
    assert power_of(100, 0.2, 0.1) < power_of(200, 0.2, 0.1) < power_of(400, 0.2, 0.1)
    assert power_table(8, 0.5).splitlines()[0] == "| answers changed, % | 2 questions | 8 questions | 32 questions |"
    with pytest.raises(UserError, match="got 1 questions, a rewording that changes 20% of the answers"):
        power_of(1, 0.2, 0.1)
