"""Dose and response: "this drop changes as many answers as a rewording of x % does"."""

from collections.abc import Sequence

import numpy as np

from pdrop_jax.analysis.effects import Mean, resampled_means


def equivalent_sizes(
    effects: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
    flipped: Sequence[np.ndarray],
    clusters: Sequence[object],
) -> list[Mean]:
    """The edit size of the rewording that changes as many answers as each effect does, in percent.

    The response to the dose is piecewise linear through no rewording, which changes nothing, and the means of each
    rewording, and never falls. Intervals are of the bootstrap that draws questions for effects and rewordings alike.

    Args:
      effects: (Q,) flipped answers of each effect.
      sizes: (Q,) edit sizes of each rewording, in percent.
      flipped: (Q,) flipped answers of each rewording.

    Returns:
      a size for each effect; infinite where the largest rewording changes fewer answers.
    """
    order = np.argsort([size.mean() for size in sizes])
    values = np.stack([*(sizes[n] for n in order), *(flipped[n] for n in order), *effects], axis=1)
    D, means = len(sizes), np.concatenate([values.mean(0)[None], resampled_means(values, clusters)])
    start = np.zeros((len(means), 1))
    doses, responses = (
        np.maximum.accumulate(np.concatenate([start, part], axis=1), axis=1)
        for part in (means[:, :D], means[:, D : 2 * D])
    )
    found = []
    for effect in means[:, 2 * D :].T:
        at = _inverse(doses, responses, effect)
        low, high = np.percentile(at[1:], [2.5, 97.5], method="nearest")  # between two values infinity has no place
        found.append(Mean(float(at[0]), float(low), float(high)))
    return found


def _inverse(doses: np.ndarray, responses: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(R,) smallest dose at which each of the rising curves (R, D) reaches ``wanted`` (R,); infinite if none does."""
    reached = responses >= wanted[:, None]
    after = reached.argmax(1)
    before = np.maximum(after - 1, 0)
    rows = np.arange(len(doses))
    low, high = responses[rows, before], responses[rows, after]
    share = np.divide(wanted - low, high - low, out=np.zeros(len(rows)), where=high > low)
    found = doses[rows, before] + share * (doses[rows, after] - doses[rows, before])
    return np.where(reached.any(1), found, np.inf)
