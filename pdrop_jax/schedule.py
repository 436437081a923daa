"""When image tokens are dropped and how many are kept: pure Python, no arrays.

The schedule determines every shape of the model, so tracing needs nothing but a plan made here.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pdrop_jax.errors import UserError
from pdrop_jax.schema import NO_OTHER_KEYS, validated

if TYPE_CHECKING:  # batch imports jax, which the command line does not wait for
    from pdrop_jax.batch import Bucket

Positions = Literal["auto", "dense", "original"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of layers that see the same tokens."""

    start: int  # first layer of the stage
    stop: int  # one past its last layer
    ratio: float  # share of each image's original tokens that the stage sees
    slots: int  # S_s, sequence slots of the stage's buffer

    @property
    def num_layers(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class DropSchedule:
    """Drop image tokens after ``layers[s]`` layers have run, keeping ``ratios[s]`` of each image (paper, section 3.2).

    Ratios are cumulative: relative to the original number of tokens, ``int(n * ratio)`` with Python's truncation.
    ``positions="dense"`` renumbers the tokens after each drop, as the official code does; ``"original"`` keeps the
    positions from before the first drop. ``"auto"`` is what suits the model: dense, or original with M-RoPE, where a
    position says where in the picture a token is; ``LlavaConfig.schedule`` has it resolved. ``score`` names a
    token-scoring function of ``model.scores``; ``seed`` is for the score "random" and ``weights`` for "quota"
    (``model.quota``, where None are its defaults).

    Raises:
      UserError: lists of different length, layers that are not ascending, ratios that increase or are not in 0..1,
        weights of another score than "quota" or not four finite numbers.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    layers: Annotated[tuple[int, ...], Field(max_length=1024)] = (8, 16, 24)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    positions: Positions = "auto"
    score: str = "pyramiddrop"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    weights: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))
        if len(self.layers) != len(self.ratios):
            raise UserError(
                f"{len(self.layers)} drop layers {list(self.layers)} but {len(self.ratios)} ratios "
                f"{list(self.ratios)}: give one ratio for each layer"
            )
        if any(b <= a for a, b in itertools.pairwise(self.layers)) or any(n < 0 for n in self.layers):
            raise UserError(f"drop layers must be ascending and at least 0, got {list(self.layers)}")
        if not all(0.0 <= ratio <= 1.0 for ratio in self.ratios):
            raise UserError(f"keep ratios must be in 0..1, got {list(self.ratios)}")
        if any(b > a for a, b in itertools.pairwise(self.ratios)):
            raise UserError(
                f"keep ratios are relative to the original tokens and must not increase, got {list(self.ratios)}"
            )
        if self.positions not in ("auto", "dense", "original"):
            raise UserError(f"positions must be 'auto', 'dense' or 'original', got {self.positions!r}")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
            if self.score != "quota" or len(self.weights) != 4 or not all(map(math.isfinite, self.weights)):
                raise UserError(
                    f"weights are four finite numbers for the score 'quota', got {list(self.weights)} for "
                    f"{self.score!r}"
                )
        if self.score == "none" and any(self.ratios):
            raise UserError(f"score 'none' drops all image tokens: its ratios must be 0, got {list(self.ratios)}")

    @classmethod
    def none(cls) -> "DropSchedule":
        """Dense LLaVA: nothing is dropped."""
        return cls((), ())

    @classmethod
    def geometric(cls, layers: Sequence[int], ratio: float) -> "DropSchedule":
        """Every drop keeps the share ``ratio`` of the remaining tokens: the paper's lambda."""
        return cls(tuple(layers), tuple(round(ratio**n, 6) for n in range(1, len(layers) + 1)))

    @classmethod
    def quarters(cls, num_layers: int, full_layers: Sequence[int] = ()) -> "DropSchedule":
        """Drops half of the remaining image tokens at each quarter of the depth, as the paper does in 32 layers.

        Args:
          full_layers: layers that attend to the whole prompt where the others have a sliding window. Each drop is made
            in front of the nearest of them, because its scores are that layer's attention.
        """
        quarters = [num_layers * n / 4 for n in (1, 2, 3)]
        return cls.geometric(sorted({nearest_full(full_layers, depth) for depth in quarters}), 0.5)

    def check(self, num_layers: int) -> None:
        """Raises UserError if a drop is outside a decoder of ``num_layers`` layers."""
        if self.layers and self.layers[-1] >= num_layers:
            raise UserError(
                f"drop after layer {self.layers[-1]} in a decoder of {num_layers} layers: "
                f"the last possible drop is after layer {num_layers - 1}"
            )

    def layer_ranges(self, num_layers: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each stage; a drop at layer 0 makes the first stage empty."""
        self.check(num_layers)
        edges = (0, *self.layers, num_layers)
        return tuple(itertools.pairwise(edges))

    def plan(self, num_layers: int, bucket: "Bucket", align: int = 1) -> tuple[Stage, ...]:
        """The stages of a decoder of ``num_layers`` layers for ``bucket``.

        Args:
          align: buffer lengths are rounded up to a multiple of this; token counts stay exact.
        """
        stages = []
        ratios = (1.0, *self.ratios)
        for (start, stop), ratio in zip(self.layer_ranges(num_layers), ratios, strict=True):
            slots = bucket.text + sum(keep_count(n, ratio) for n in bucket.images)
            stages.append(Stage(start, stop, ratio, -(-slots // align) * align))
        return tuple(stages)

    def to_json(self) -> dict[str, Any]:
        """What follows ``positions`` is left out if it is the default, as in checkpoints from before it existed."""
        data = {"layers": list(self.layers), "ratios": list(self.ratios), "positions": self.positions}
        paper = {field.name: field.default for field in dataclasses.fields(self)}
        return data | {
            name: getattr(self, name) for name in ("score", "seed", "weights") if getattr(self, name) != paper[name]
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "DropSchedule":
        """Raises UserError unless ``data`` has the form of ``to_json``."""
        return validated(cls, data, "the drop schedule")


# For a decoder of 32 layers and 576 image tokens: the paper's own, and averages of 192, 128 and 64 tokens over layers.
# The paper reports results for these averages (table 4) but no schedules; its first author named these layers.
PRESETS = {
    "paper": DropSchedule(),
    "tokens-192": DropSchedule.geometric((2, 8, 16), 0.560),
    "tokens-128": DropSchedule.geometric((2, 8, 16), 0.420),
    "tokens-64": DropSchedule.geometric((2, 8, 16), 0.192),
}


def parse_schedule(
    layers: Sequence[str] | None, ratios: Sequence[str | float] | None, score: str | None = None
) -> DropSchedule | None:
    """A schedule as a user writes it: numbers for both, or for ``layers`` alone "none" or a name in ``PRESETS``.

    Returns:
      None if neither is given.

    Raises:
      UserError: one without the other, something that is not a number, or only a score; see also ``DropSchedule``.
    """
    if layers is None and ratios is None:
        if score is not None:
            raise UserError(f"score {score!r} belongs to a schedule: pass layers too, for example paper")
        return None
    named = {"none": DropSchedule.none(), **PRESETS}
    if ratios is None and layers is not None and len(layers) == 1 and layers[0] in named:
        schedule = named[layers[0]]
        return schedule if score is None else dataclasses.replace(schedule, score=score)
    if layers is None or ratios is None:
        raise UserError(
            "layers and ratios belong together: pass both, neither, or for layers alone one of " + ", ".join(named)
        )
    try:
        numbers = tuple(map(int, layers)), tuple(map(float, ratios))
    except ValueError:
        raise UserError(
            f"layers must be integers and ratios numbers, got {' '.join(layers)} and {' '.join(map(str, ratios))}"
        ) from None
    return DropSchedule(*numbers, score=score or DropSchedule.score)


def nearest_full(full_layers: Sequence[int], depth: float) -> int:
    """The layer of ``full_layers`` nearest to ``depth``, the earlier of two; ``depth`` rounded if there is none."""
    return min(full_layers, key=lambda layer: abs(layer - depth), default=round(depth))


def keep_count(n: int, ratio: float) -> int:
    """Tokens kept of an image with ``n`` tokens: truncated in double precision, so 100 at 0.29 keeps 28."""
    return int(n * ratio)


def keep_table(n_max: int, ratio: float) -> Sequence[int]:
    """``keep_count`` of 0..n_max. Double-precision truncation cannot be had on an accelerator, a table can."""
    return [keep_count(n, ratio) for n in range(n_max + 1)]
