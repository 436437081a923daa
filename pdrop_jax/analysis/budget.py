"""Find a drop schedule for a budget of image tokens, MACs or KV cache bytes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

from pdrop_jax.analysis.cost import layer_tokens, paper_macs, token_bytes
from pdrop_jax.config import TextConfig
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule, nearest_full

# Candidate drop layers as fractions of the depth. Earlier drops can meet smaller budgets.
DEPTHS = ((1 / 4, 1 / 2, 3 / 4), (1 / 16, 1 / 4, 1 / 2), (1 / 16, 1 / 8, 3 / 16, 1 / 4))
GENTLE = 0.25  # a drop that keeps a smaller share of its input is the last resort


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on the cost of the image tokens of a prompt with one image.

    Attributes:
      name: image tokens per layer, averaged over layers; MACs of the language model by the paper's formula (section
        3.3); or KV cache size.
    """

    name: Literal["average tokens", "MACs", "cache bytes"]
    value: float

    @classmethod
    def of(cls, average_tokens: float | None, macs: float | None, cache_bytes: float | None) -> "Budget":
        """Raises UserError unless exactly one is given."""
        every: list[tuple[Literal["average tokens", "MACs", "cache bytes"], float | None]]
        every = [("average tokens", average_tokens), ("MACs", macs), ("cache bytes", cache_bytes)]
        given = [cls(name, value) for name, value in every if value is not None]
        if len(given) != 1:
            raise UserError(f"give exactly one budget, of average tokens, MACs or cache bytes: got {len(given)}")
        return given[0]

    def cost(self, text: TextConfig, schedule: DropSchedule, *, image_tokens: int, itemsize: int = 2) -> float:
        """What a schedule costs of this budget's kind."""
        if self.name == "MACs":
            return paper_macs(text, schedule, image_tokens)
        tokens = layer_tokens(text, schedule, image_tokens)
        return tokens * token_bytes(text, itemsize) if self.name == "cache bytes" else tokens / text.num_layers


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
    """Finds the geometric schedule with the largest ratio whose cost stays within one budget.

    The budgets count a prompt with one image of ``image_tokens`` tokens.

    Args:
      text: config of the language model, ``config.text``; LLaVA-1.5-7B by default.
      average_tokens: image tokens per layer, averaged over layers.
      macs: MACs of the language model for the image tokens, by the paper's formula (section 3.3).
      cache_bytes: KV cache size of the image tokens.
      layers: drop after these many layers. None tries three sets of layers and takes the latest one that meets the
        budget while every drop keeps at least a quarter of the image tokens; if there is none, the one with the largest
        ratio.
      itemsize: bytes per element of a KV cache that is not quantized.

    Raises:
      UserError: not exactly one budget is given, or no ratio meets it; the message states the smallest possible cost.
    """
    limit = Budget.of(average_tokens, macs, cache_bytes)
    cost = functools.partial(limit.cost, text, image_tokens=image_tokens, itemsize=itemsize)
    name, budget = limit.name, limit.value
    if cost(DropSchedule.none()) <= budget:
        return DropSchedule.none()
    L = text.num_layers
    # A drop is ranked by the attention of the layer behind it: among sliding windows that is to be a full layer.
    evenly = [sorted({max(1, nearest_full(text.full_layers, depth * L)) for depth in depths}) for depths in DEPTHS]
    choices = [layers] if layers else evenly

    def fits(layers: Sequence[int], ratio: float) -> bool:
        return cost(DropSchedule.geometric(layers, ratio)) <= budget

    found = [(choice, _largest(functools.partial(fits, choice))) for choice in choices]
    possible = [(choice, ratio) for choice, ratio in found if ratio is not None]
    if not possible:
        floor = min(cost(DropSchedule.geometric(choice, 0.0)) for choice in choices)
        raise UserError(
            f"a budget of {budget:,.10g} {name} cannot be met with drops after layers {list(choices[-1])}: "
            f"dropping all image tokens there still costs {floor:,.10g}; drop earlier or raise the budget"
        )
    gentle = [each for each in possible if each[1] >= GENTLE]
    return DropSchedule.geometric(*(gentle[0] if gentle else max(possible, key=lambda each: each[1])))


def _largest(fits: Callable[[float], bool]) -> float | None:
    """Largest ratio, in steps of 0.001, for which ``fits`` holds; None if there is none. Larger ratios cost more."""
    low, high = 0, 1000  # invariant: fits(low), not fits(high)
    if not fits(0.0):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle / 1000) else (low, middle)
    return low / 1000
