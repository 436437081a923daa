"""Which rows of several sources an epoch has."""

from collections.abc import Sequence

import numpy as np

from pdrop_jax.errors import UserError


def rows_per_source(counts: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """(S,) int64, rows of each source in an epoch: as many in all as the sources have, in proportion to the weights.

    Fractions are rounded by largest remainder, the first source first among equals.

    Args:
      counts: rows that each source has.

    Raises:
      UserError: a source would have no row.
    """
    total = sum(counts)
    exact = total * np.array(weights, float) / sum(weights)
    rows = np.floor(exact).astype(np.int64)
    short = total - int(rows.sum())
    rows[np.argsort(rows - exact, kind="stable")[:short]] += 1
    if not rows.all():
        number = int(np.argmin(rows))
        raise UserError(
            f"data.sources.{number}.weight is {weights[number]:g} of {sum(weights):g}, which is less than one of the "
            f"{total:,} rows of an epoch: raise it or remove the source"
        )
    return rows


def rows_of_epoch(counts: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """(N,) int64, the rows of ``epoch`` (from 0), source by source; source s has rows sum(counts[:s]) and up.

    A source is read pass after pass, each in another order, and an epoch goes on where the last one ended. So all of
    its rows are read equally often, give or take one, however large its share is.
    """
    found = []
    first = np.cumsum([0, *counts])
    for source, (count, rows) in enumerate(zip(counts, rows_per_source(counts, weights).tolist(), strict=True)):
        start, stop = epoch * rows, (epoch + 1) * rows
        passes = [
            np.random.default_rng([seed, source, number]).permutation(count)
            for number in range(start // count, -(-stop // count))
        ]
        skipped = start // count * count
        found.append(first[source] + np.concatenate(passes)[start - skipped : stop - skipped])
    return np.concatenate(found)
