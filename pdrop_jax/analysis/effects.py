"""The effect of a change on a model's answers: its size, its 95 % interval, and whether it exceeds noise."""

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over questions with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Effect:
    """How the answer to each question differs from the reference's.

    Attributes:
      texts: Q answers.
      flipped: (Q,) 1 where the answer differs.
      kl: (Q,) nats, KL divergence of the first new token's distribution from the reference's.
      jsd: (Q,) nats, Jensen-Shannon divergence of the two.
      right: (Q,) 1 where the answer is the expected one; None if there are no expected answers.
      outcome: (Q,) log-probability of the expected answer's first token, or None likewise.
    """

    texts: list[str]
    flipped: np.ndarray
    kl: np.ndarray
    jsd: np.ndarray
    right: np.ndarray | None = None
    outcome: np.ndarray | None = None


def flipped(reference: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """(Q,) 1 where the answer is not exactly the reference's."""
    return np.array([a != b for a, b in zip(reference, answers, strict=True)], float)


def right(answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
    """(Q,) 1 where the answer is the expected one, ignoring case and white space at both ends."""
    pairs = zip(answers, expected, strict=True)
    return np.array([text.strip().lower() == wanted.strip().lower() for text, wanted in pairs], float)


def average(effects: Sequence[Effect]) -> Effect:
    """The mean effect of several draws on each question; its texts are those of the first."""
    first = effects[0]
    names = [name for name in ("flipped", "kl", "jsd", "right", "outcome") if getattr(first, name) is not None]
    means = {name: np.mean([getattr(effect, name) for effect in effects], axis=0) for name in names}
    return dataclasses.replace(first, **means)


def mean_of(values: np.ndarray, clusters: Sequence[object], seed: int = 0) -> Mean:
    """The mean of ``values`` (Q,) and its bootstrap interval (percentiles 2.5 and 97.5 of 2,000 resamples)."""
    low, high = np.percentile(resampled_means(values[:, None], clusters, seed), [2.5, 97.5])
    return Mean(float(values.mean()), float(low), float(high))


def resampled_means(values: np.ndarray, clusters: Sequence[object], seed: int = 0) -> np.ndarray:
    """Means (2000, N) of ``values`` (Q, N) in each bootstrap resample.

    Whole clusters are resampled, since questions about one image are not independent.
    """
    _, number = np.unique([str(cluster) for cluster in clusters], return_inverse=True)
    counts = np.bincount(number)
    P = len(counts)
    sums = np.stack([np.bincount(number, column, minlength=P) for column in values.T], axis=1)
    drawn = np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), RESAMPLES)  # how often each cluster is drawn
    return (drawn @ sums) / (drawn @ counts)[:, None]


def beyond(effect: Effect, noise: Effect, clusters: Sequence[object]) -> tuple[bool, bool]:
    """Whether (flipped answers, divergence) significantly exceed those of ``noise``, paired by question."""
    flips = mean_of(effect.flipped - noise.flipped, clusters)
    kl = mean_of(effect.kl - noise.kl, clusters)
    return flips.low > 0, kl.low > 0
