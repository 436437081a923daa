"""What a change does to a model's answers: by how much, how surely, and whether that is more than noise."""

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers to Q questions.

    Attributes:
      texts: Q answers.
      log_probs: (Q, V) float32, of the first new token.
      kept: [question][stage boundary][image] -> tokens that stayed.
      image_tokens: [question][image], how many there were.
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
    """How answers differ from those of the reference, question by question.

    Attributes:
      flipped: (Q,) 1 where the answer is another one.
      kl: (Q,) nats, KL divergence of the first new token's distribution from the reference's.
      right: (Q,) 1 where the answer is the expected one; None if nobody said what to expect.
    """

    flipped: np.ndarray
    kl: np.ndarray
    right: np.ndarray | None


def effect_of(reference: Answers, answers: Answers, expected: Sequence[str] | None) -> Effect:
    """Texts are compared as they are, expected ones without regard to case."""
    flipped = np.array([a != b for a, b in zip(reference.texts, answers.texts, strict=True)], float)
    right = None
    if expected is not None:
        pairs = zip(answers.texts, expected, strict=True)
        right = np.array([text.strip().lower() == wanted.strip().lower() for text, wanted in pairs], float)
    return Effect(flipped, divergence(reference.log_probs, answers.log_probs), right)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats of log-probabilities (Q, V) -> (Q,)."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    return (np.exp(p) * (p - q)).sum(-1)


def mean_of(values: np.ndarray, clusters: Sequence[object], seed: int = 0) -> Mean:
    """The mean of ``values`` (Q,) and its bootstrap interval (percentiles 2.5 and 97.5 of 2,000 resamples).

    Whole clusters are drawn: questions about one picture are not independent.
    """
    _, number = np.unique([str(cluster) for cluster in clusters], return_inverse=True)
    sums, counts = np.bincount(number, values), np.bincount(number)
    P = len(counts)
    drawn = np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), RESAMPLES)  # how often each cluster
    low, high = np.percentile(drawn @ sums / (drawn @ counts), [2.5, 97.5])
    return Mean(float(values.mean()), float(low), float(high))


def beyond(effect: Effect, noise: Effect, clusters: Sequence[object]) -> tuple[bool, bool]:
    """Whether (answers flipped, divergence) are surely larger than those of ``noise``, question by question."""
    flipped = mean_of(effect.flipped - noise.flipped, clusters)
    kl = mean_of(effect.kl - noise.kl, clusters)
    return flipped.low > 0, kl.low > 0
