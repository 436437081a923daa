"""A drop schedule for a budget of tokens, MACs or cache bytes."""

import functools
from collections.abc import Callable, Sequence

from pdrop_jax.analysis.cost import layer_tokens, paper_macs, token_bytes
from pdrop_jax.config import TextConfig
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

# Where ``schedule_for_budget`` may drop, as shares of the depth; the earlier, the smaller a budget can be had.
DEPTHS = ((1 / 4, 1 / 2, 3 / 4), (1 / 16, 1 / 4, 1 / 2), (1 / 16, 1 / 8, 3 / 16, 1 / 4))
GENTLE = 0.25  # a drop that leaves less of what it finds is the last resort


def schedule_for_budget(
    text: TextConfig = TextConfig(),
    *,
    average_tokens: float | None = None,
    macs: float | None = None,
    cache_bytes: float | None = None,
    layers: Sequence[int] | None = None,
    image_tokens: int = 576,
    itemsize: int = 2,
) -> DropSchedule:
    """The gentlest geometric schedule within one budget, all of which count one image of ``image_tokens``.

    Args:
      text: of the model, ``config.text``; LLaVA-1.5-7B's if none is given.
      average_tokens: image tokens that a layer sees, averaged over layers.
      macs: of the language model for the image tokens, by the paper's formula (section 3.3).
      cache_bytes: keys and values of the image tokens.
      layers: where to drop. None takes the latest of three choices that the budget allows without any drop leaving
        less than a quarter of what it finds, or else the gentlest.
      itemsize: bytes of a number in the cache.

    Raises:
      UserError: not one budget, or one that no ratio meets; it says what dropping everything leaves.
    """
    budgets = {"average tokens": average_tokens, "MACs": macs, "cache bytes": cache_bytes}
    given = {name: budget for name, budget in budgets.items() if budget is not None}
    if len(given) != 1:
        raise UserError(f"a schedule is for one budget, of average tokens, MACs or cache bytes: got {len(given)}")
    ((name, budget),) = given.items()

    def cost(schedule: DropSchedule) -> float:
        if name == "MACs":
            return paper_macs(text, schedule, image_tokens)
        if name == "cache bytes":
            return layer_tokens(text, schedule, image_tokens) * token_bytes(text, itemsize)
        return layer_tokens(text, schedule, image_tokens) / text.num_layers

    if cost(DropSchedule.none()) <= budget:
        return DropSchedule.none()
    L = text.num_layers
    choices = [layers] if layers else [sorted({max(1, round(depth * L)) for depth in depths}) for depths in DEPTHS]

    def fits(layers: Sequence[int], ratio: float) -> bool:
        return cost(DropSchedule.geometric(layers, ratio)) <= budget

    found = [(choice, _largest(functools.partial(fits, choice))) for choice in choices]
    possible = [(choice, ratio) for choice, ratio in found if ratio is not None]
    if not possible:
        floor = min(cost(DropSchedule.geometric(choice, 0.0)) for choice in choices)
        raise UserError(
            f"a budget of {budget:,.10g} {name} cannot be had with drops after layers {list(choices[-1])}: "
            f"dropping everything there leaves {floor:,.10g}; drop earlier or allow more"
        )
    gentle = [each for each in possible if each[1] >= GENTLE]
    return DropSchedule.geometric(*(gentle[0] if gentle else max(possible, key=lambda each: each[1])))


def _largest(fits: Callable[[float], bool]) -> float | None:
    """The largest ratio in thousandths that ``fits``, which larger ones do not."""
    low, high = 0, 1000  # fits(low) if any does, fits(high) does not
    if not fits(0.0):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle / 1000) else (low, middle)
    return low / 1000
