"""The effect of a change on a model's answers: its size, its 95 % interval, and whether it exceeds noise."""

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers to Q questions.

    Attributes:
      texts: Q answers.
      log_probs: (Q, V) float32, log-probabilities of the first new token.
      kept: [question][stage boundary][image] -> indices of the kept tokens.
      image_tokens: [question][image], number of tokens before the first drop.
    """

    texts: list[str]
    log_probs: np.ndarray
    kept: list[list[list[list[int]]]]
    image_tokens: list[list[int]]


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
      flipped: (Q,) 1 where the answer differs.
      kl: (Q,) nats, KL divergence of the first new token's distribution from the reference's.
      right: (Q,) 1 where the answer is the expected one; None if there are no expected answers.
    """

    flipped: np.ndarray
    kl: np.ndarray
    right: np.ndarray | None


def effect_of(reference: Answers, answers: Answers, expected: Sequence[str] | None) -> Effect:
    """The effect of a change on the ``answers``. They are compared exactly, with expected ones ignoring case."""
    flipped = np.array([a != b for a, b in zip(reference.texts, answers.texts, strict=True)], float)
    right = None
    if expected is not None:
        pairs = zip(answers.texts, expected, strict=True)
        right = np.array([text.strip().lower() == wanted.strip().lower() for text, wanted in pairs], float)
    return Effect(flipped, divergence(reference.log_probs, answers.log_probs), right)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats, from log-probabilities (Q, V) to (Q,)."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    return (np.exp(p) * (p - q)).sum(-1)


def mean_of(values: np.ndarray, clusters: Sequence[object], seed: int = 0) -> Mean:
    """The mean of ``values`` (Q,) and its bootstrap interval (percentiles 2.5 and 97.5 of 2,000 resamples).

    Whole clusters are resampled, since questions about one image are not independent.
    """
    _, number = np.unique([str(cluster) for cluster in clusters], return_inverse=True)
    sums, counts = np.bincount(number, values), np.bincount(number)
    P = len(counts)
    drawn = np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), RESAMPLES)  # how often each cluster is drawn
    low, high = np.percentile(drawn @ sums / (drawn @ counts), [2.5, 97.5])
    return Mean(float(values.mean()), float(low), float(high))


def beyond(effect: Effect, noise: Effect, clusters: Sequence[object]) -> tuple[bool, bool]:
    """Whether (flipped answers, divergence) significantly exceed those of ``noise``, paired by question."""
    flipped = mean_of(effect.flipped - noise.flipped, clusters)
    kl = mean_of(effect.kl - noise.kl, clusters)
    return flipped.low > 0, kl.low > 0
