"""Whether a change affects answers more than another one: the paired tests of arXiv 2605.01048.

A positive difference means that the change moves answers further from the reference's than the baseline does, except
for mutual information and phi, which fall with distance. p-values are two-sided except for the regression's.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from pdrop_jax.analysis.metrics import LabelMetrics
from pdrop_jax.errors import UserError

LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Significance:
    """The result of a test.

    Attributes:
      metric: "JSD", "KL", a name in ``LABEL_METRICS`` or "log-probability of the answer".
      test: "paired t", "paired bootstrap" or "regression".
      difference: of the means, of the metrics, or the slope; NaN where the metric is undefined.
      low, high: its 95 % confidence interval.
      p: p-value; 1 if all differences are alike.
      samples: number of questions.
      corrected: p-value after ``bonferroni``.
      statistic: t; None for the bootstrap.
    """

    metric: str
    test: str
    difference: float
    low: float
    high: float
    p: float
    samples: int
    corrected: float = 1.0
    statistic: float | None = None


def paired_t(metric: str, target: np.ndarray, baseline: np.ndarray) -> Significance:
    """Two-sided paired t-test of target - baseline, both (Q,).

    Raises:
      UserError: there are fewer than 2 questions.
    """
    difference = target.astype(np.float64) - baseline.astype(np.float64)
    n = check_samples(len(difference))
    mean = float(difference.mean())
    if not difference.std(ddof=1):
        return Significance(metric, "paired t", mean, mean, mean, 1.0, n, statistic=0.0)
    found = stats.ttest_rel(target, baseline)
    low, high = found.confidence_interval(1 - LEVEL)
    return Significance(
        metric, "paired t", mean, float(low), float(high), float(found.pvalue), n, statistic=float(found.statistic)
    )


def paired_bootstrap(metric: str, target: LabelMetrics, baseline: LabelMetrics) -> Significance:
    """Paired bootstrap of metric(target) - metric(baseline): p = min(1, 2 min(P(d <= 0), P(d >= 0))).

    Resamples for which the metric is undefined are left out.
    """
    observed = target.observed[metric] - baseline.observed[metric]
    differences = target.resampled[metric] - baseline.resampled[metric]
    differences = differences[~np.isnan(differences)]
    result = Significance(metric, "paired bootstrap", observed, observed, observed, 1.0, check_samples(target.samples))
    if np.isnan(observed) or not len(differences) or np.allclose(differences, differences[0]):
        return result
    p = min(1.0, 2 * min(float((differences <= 0).mean()), float((differences >= 0).mean())))
    low, high = np.percentile(differences, [100 * LEVEL / 2, 100 - 100 * LEVEL / 2])
    return dataclasses.replace(result, p=p, low=float(low), high=float(high))


def directional_regression(direction: np.ndarray, difference: np.ndarray) -> Significance:
    """Least squares of ``difference`` (Q,) = slope * ``direction`` (Q,) without intercept; one-sided: the slope is < 0.

    The difference is log p(outcome | target) - log p(outcome | baseline). The direction, not 0, is that in which the
    change is expected to act.

    Raises:
      UserError: there are fewer than 2 questions.
    """
    x, y = direction.astype(np.float64), difference.astype(np.float64)
    n = check_samples(len(x))
    slope = float((x @ y) / (x @ x))
    error = float(np.sqrt(((y - slope * x) ** 2).sum() / (n - 1) / (x @ x)))
    result = Significance("log-probability of the answer", "regression", slope, slope, slope, 1.0, n, statistic=0.0)
    if not error:
        return result
    reach = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    p = float(stats.t.cdf(slope / error, n - 1))
    return dataclasses.replace(result, low=slope - reach, high=slope + reach, p=p, statistic=slope / error)


def bonferroni(tests: Sequence[Significance]) -> list[Significance]:
    """``tests`` with their p-values corrected for their number."""
    return [dataclasses.replace(test, corrected=min(1.0, test.p * len(tests))) for test in tests]


def check_samples(n: int) -> int:
    """Raises UserError if there are too few questions for a test."""
    if n < 2:
        raise UserError(f"a paired test needs at least 2 questions, got {n}: ask more")
    return n
