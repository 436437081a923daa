"""How far answers are from others: per question, and over all questions.

The definitions are those of "Compared to What? Baselines and Metrics for Counterfactual Prompting" (arXiv 2605.01048)
as in its package cfprompt 0.1.1, whose numbers these functions repeat (``tests/analysis/test_against_cfprompt.py``).
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

EPS = 1e-12  # smallest probability within a logarithm
RESAMPLES, SEED, CHUNK = 10_000, 42, 512
LABEL_METRICS = ("flip rate", "mutual information", "phi")


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats, from probabilities (Q, V) to (Q,); probabilities in the logarithms are at least ``EPS``."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    ratio = np.log(np.clip(p, EPS, 1)) - np.log(np.clip(q, EPS, 1))
    return np.where(p > 0, p * ratio, 0).sum(-1)


def jsd(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in nats, 0 to ln 2, from probabilities (Q, V) to (Q,)."""
    middle = (p.astype(np.float64) + q.astype(np.float64)) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def edit_size(ids: Sequence[int], changed: Sequence[int]) -> float:
    """Levenshtein distance of two lists of token ids, in percent of the length of the first, which is not empty."""
    return _levenshtein(ids, changed) / len(ids) * 100


def _levenshtein(a: Sequence[int], b: Sequence[int]) -> int:
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    a, b = a[start:], b[start:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@dataclasses.dataclass(frozen=True)
class LabelMetrics:
    """``LABEL_METRICS`` between the labels of a reference and others, of all questions and of each resample.

    Attributes:
      observed: the metric by name; NaN where it is undefined.
      resampled: (``RESAMPLES``,) float64 by name, of the same questions for every instance of as many questions.
      samples: number of questions.
    """

    observed: dict[str, float]
    resampled: dict[str, np.ndarray]
    samples: int


def label_metrics(reference: Sequence[str], labels: Sequence[str], resamples: int = RESAMPLES) -> LabelMetrics:
    """Flip rate, mutual information in nats, and phi between two labels of each question.

    Phi is defined for two labels that both occur on both sides, and NaN otherwise. Resamples are drawn with
    ``RandomState(SEED)``, as the paper's.
    """
    n, names = len(reference), np.unique([*reference, *labels])
    pairs, codes = np.unique(
        np.stack([np.searchsorted(names, reference), np.searchsorted(names, labels)], 1), axis=0, return_inverse=True
    )
    observed = _from_counts(np.bincount(codes, minlength=len(pairs))[None], pairs, n)
    parts = [_from_counts(counts, pairs, n) for counts in _counts(codes.reshape(-1), len(pairs), resamples)]
    return LabelMetrics(
        {name: float(values[0]) for name, values in observed.items()},
        {name: np.concatenate([part[name] for part in parts]) for name in observed},
        n,
    )


def _counts(codes: np.ndarray, pairs: int, resamples: int) -> Iterator[np.ndarray]:
    """(up to CHUNK, ``pairs``): how often each pair of labels occurs in each resample of ``codes`` (n,)."""
    rng = np.random.RandomState(SEED)
    for at in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - at)
        drawn = codes[rng.randint(0, len(codes), size=(rows, len(codes)))]
        found = np.bincount((drawn + pairs * np.arange(rows)[:, None]).ravel(), minlength=rows * pairs)
        yield found.reshape(rows, pairs)


def _from_counts(counts: np.ndarray, pairs: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """The metrics of R tables of counts (R, U) of the pairs of labels (U, 2)."""
    first, second = pairs.T
    flips = counts[:, first != second].sum(1) / n
    return dict(
        zip(LABEL_METRICS, (flips, _information(counts, first, second, n), _phi(counts, pairs, n)), strict=True)
    )


def _information(counts: np.ndarray, first: np.ndarray, second: np.ndarray, n: int) -> np.ndarray:
    names = max(first.max(), second.max()) + 1
    marginals = [(counts @ np.eye(names, dtype=int)[side]) / n for side in (first, second)]
    total = np.zeros(len(counts))
    for u in range(len(first)):  # in the order of the package, so that resamples that are equal there are equal here
        share, product = counts[:, u] / n, marginals[0][:, first[u]] * marginals[1][:, second[u]]
        there = share > 0
        total[there] += share[there] * (np.log(share[there]) - np.log(product[there]))
    return total


def _phi(counts: np.ndarray, pairs: np.ndarray, n: int) -> np.ndarray:
    names = np.unique(pairs)
    undefined = np.full(len(counts), np.nan)
    if len(names) != 2:
        return undefined
    share = np.zeros((2, 2, len(counts)))
    for pair, count in zip(np.searchsorted(names, pairs), counts.T, strict=True):
        share[tuple(pair)] = count / n
    (p00, p01), (p10, p11) = share
    square = (p11 + p10) * (p01 + p00) * (p11 + p01) * (p10 + p00)
    return np.divide(p11 * p00 - p10 * p01, np.sqrt(square), out=undefined, where=square > 0)
