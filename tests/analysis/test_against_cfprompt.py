"""The statistics of a study against the package of arXiv 2605.01048, on the same arrays and with the same seed."""

import numpy as np
import pytest
from cfprompt.metrics import distributional, label
from cfprompt.metrics.regression import fit_difference
from cfprompt.stats import bootstrap_diff, regression_test
from cfprompt.stats import paired_t as their_paired_t
from cfprompt.tokenization import token_edit_distance_pct

from pdrop_jax.analysis.metrics import edit_size, jsd, kl, label_metrics
from pdrop_jax.analysis.significance import directional_regression, paired_bootstrap, paired_t

THEIRS = {"flip rate": label.flip_rate, "mutual information": label.mutual_information, "phi": label.phi_coefficient}
CASES = [  # questions, labels, flips of target and baseline, seed
    (60, ["yes", "no"], 0.25, 0.15, 0),
    (12, ["yes", "no"], 0.3, 0.3, 1),  # phi is undefined in some resamples
    (40, ["10", "2", "bag", "Bag", "é"], 0.4, 0.2, 2),
    (9, ["bag"], 0.0, 0.0, 3),
]


def probabilities(rng, n, classes):
    p = rng.dirichlet(np.full(classes, 0.3), n)
    p[0], p[1, 0] = np.eye(classes)[0], 0  # a certain answer, and an impossible one
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_divergences_and_their_t_test(seed):
    rng = np.random.default_rng(seed)
    reference, target, baseline = (probabilities(rng, 50, 7) for _ in range(3))
    for name, ours, theirs in (("JSD", jsd, distributional.jsd), ("KL", kl, distributional.kl)):
        a, b = ours(reference, target), ours(reference, baseline)
        np.testing.assert_array_equal(a, theirs(reference, target))
        np.testing.assert_array_equal(b, theirs(reference, baseline))
        found, expected = paired_t(name, a, b), their_paired_t(a, b, name)
        assert (found.statistic, found.p, found.samples) == (expected.statistic, expected.p_value, expected.n)
        assert (found.low, found.high) == pytest.approx((expected.ci_low, expected.ci_high), rel=1e-12)
    assert paired_t("KL", a, a).p == their_paired_t(a, a, "kl").p_value == 1


@pytest.mark.parametrize(("n", "names", "flip", "other_flip", "seed"), CASES)
def test_label_metrics_and_their_bootstrap(n, names, flip, other_flip, seed):
    rng = np.random.default_rng(seed)
    reference = rng.choice(names, n)
    target, baseline = (
        np.where(rng.random(n) < share, rng.choice(names, n), reference) for share in (flip, other_flip)
    )
    draws = 1000
    ours = [label_metrics(reference.tolist(), labels.tolist(), draws) for labels in (target, baseline)]
    for name, theirs in THEIRS.items():
        if name == "phi" and len(names) > 2:
            assert np.isnan(ours[0].observed[name])
            continue
        found = paired_bootstrap(name, *ours)
        expected = bootstrap_diff(reference, target, baseline, theirs, name, n_bootstrap=draws)
        assert found.p == expected.p_value
        if expected.statistic is None:
            assert np.isnan(found.difference)
        else:
            assert (found.difference, found.low, found.high) == (expected.statistic, expected.ci_low, expected.ci_high)
            dropped = expected.extra["n_dropped_resamples"]
            assert np.isnan(ours[0].resampled[name] - ours[1].resampled[name]).sum() == dropped
            assert bool(dropped) == (n == 12 and name == "phi")


@pytest.mark.parametrize("directions", [[1.0], [-1.0, 1.0, 2.5]])
def test_the_directional_regression(directions):
    rng = np.random.default_rng(0)
    direction = rng.choice(directions, 30)
    difference = -0.2 * direction + rng.normal(0, 0.5, 30)
    found = directional_regression(direction, difference)
    expected = regression_test(fit_difference(direction, difference), "less", 30)
    ours = (found.difference, found.statistic, found.p, found.low, found.high)
    beta = expected.extra["beta"]
    theirs = (beta, expected.statistic, expected.p_value, expected.ci_low, expected.ci_high)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_edit_sizes():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (rng.integers(0, 4, rng.integers(least, 9)).tolist() for least in (1, 0))
        assert edit_size(a, b) == token_edit_distance_pct(a, b)
