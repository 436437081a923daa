"""QUOTA's allocation of drops to layers (arXiv 2604.17320): sensitive layers drop less, and the sum meets a budget.

The paper's text was not at hand. From notes on it come the formulas of ``rescaled_sensitivity``, ``drop_shares`` and
``cumulative_ratios``, and that the candidate layers are a contiguous range, early to middle, without the first two and
the last few, where text attends to the picture. Ours are the temperature, how the range is found, and that the share of
tokens that is left at the end follows from the budget.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pdrop_jax.analysis.budget import Budget
from pdrop_jax.config import TextConfig
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

Numbers = Sequence[float] | np.ndarray
TAU = 0.5  # of the softmax: the least sensitive layer drops e^(0.8 / TAU) = 5 times as much as the most sensitive one
FIRST = 2  # layers before the first candidate
LAST = 1 / 8  # of the layers, behind the last candidate
ATTENTION = 0.8  # of the text's attention to the picture within the range is in the candidates
HALVINGS = 50  # of the interval of the last ratio


class BudgetTooSmall(UserError):
    """Dropping all image tokens costs more than the budget."""


def rescaled_sensitivity(values: Numbers) -> np.ndarray:
    """S_l (L,) clipped to its 10th and 90th percentile and scaled to .1 … .9; .5 everywhere if all are alike."""
    low, high = np.percentile(values, [10, 90])
    if high <= low:
        return np.full(len(values), 0.5)
    return 0.1 + 0.8 * (np.clip(values, low, high) - low) / (high - low)


def candidate_layers(attention: Numbers, first: int = FIRST) -> tuple[int, ...]:
    """The contiguous range of drop layers in which text attends to the picture.

    Args:
      attention: (L,) share of the attention of text in layer l that image tokens get.
      first: no drop is made before so many layers.

    Raises:
      UserError: the decoder has too few layers.
    """
    L = len(attention)
    stop = L - max(1, round(L * LAST))
    if stop <= first:
        raise UserError(f"a decoder of {L} layers has no candidates for drops: name layers, --layers N")
    reached = np.cumsum(attention[first:stop]) / max(np.sum(attention[first:stop]), 1e-12)
    return tuple(range(first, first + int(np.searchsorted(reached, ATTENTION)) + 1))


def drop_shares(sensitivity: np.ndarray, tau: float = TAU) -> np.ndarray:
    """pi_i = softmax((1 - S_i) / tau): how the drops are shared among the candidates."""
    weights = np.exp((1 - sensitivity) / tau)
    return weights / weights.sum()


def cumulative_ratios(shares: Numbers, floor: float) -> tuple[float, ...]:
    """r_i = max(floor, 1 - (1 - floor) * (pi_1 + … + pi_i)): what is kept after each drop, ``floor`` at the end."""
    kept = 1 - (1 - floor) * np.cumsum(shares)
    kept[-1] = floor
    return tuple(float(x) for x in np.minimum.accumulate(np.maximum(floor, kept)))


def allocate(
    text: TextConfig, schedule: DropSchedule, shares: Numbers, budget: Budget, image_tokens: int
) -> DropSchedule:
    """``schedule`` with the largest ratios in the proportion of ``shares`` whose cost is within the budget.

    The cost is that of ratios, without their truncation to whole tokens, so that the budget is met exactly.

    Raises:
      BudgetTooSmall: dropping all image tokens at these layers costs more.
      UserError: dropping none costs no more.
    """

    def at(floor: float) -> DropSchedule:
        return dataclasses.replace(schedule, ratios=cumulative_ratios(shares, floor))

    def cost(floor: float) -> float:
        return _exact_cost(text, at(floor), budget, image_tokens)

    if cost(1.0) <= budget.value:
        raise UserError(
            f"a budget of {budget.value:,.10g} {budget.name} is met without drops, which cost {cost(1.0):,.10g}: "
            "lower it"
        )
    if cost(0.0) > budget.value:
        raise BudgetTooSmall(
            f"a budget of {budget.value:,.10g} {budget.name} cannot be met with drops after layers "
            f"{list(schedule.layers)} in these proportions: dropping all image tokens after the last still costs "
            f"{cost(0.0):,.10g}; drop earlier (--layers) or raise the budget"
        )
    low, high = 0.0, 1.0  # invariant: low is within the budget, high is not
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget.value else (low, middle)
    return at(low)


def _exact_cost(text: TextConfig, schedule: DropSchedule, budget: Budget, image_tokens: int) -> float:
    """The cost of a schedule in ``budget``'s kind, with fractions of a token."""
    if budget.name == "MACs":
        return budget.cost(text, schedule, image_tokens=image_tokens)
    ratios, ranges = (1.0, *schedule.ratios), schedule.layer_ranges(text.num_layers)
    layers = sum(ratio * (stop - start) for ratio, (start, stop) in zip(ratios, ranges, strict=True))
    one = budget.cost(text, DropSchedule.none(), image_tokens=image_tokens) / text.num_layers
    return layers * one
