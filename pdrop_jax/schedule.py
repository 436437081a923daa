"""When image tokens are dropped and how many stay: pure Python, no arrays.

The schedule fixes every shape of the model, so a plan made here is all that tracing needs.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

from pdrop_jax.errors import UserError

Positions = Literal["dense", "original"]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The static shape of a batch: ``text`` slots, and one full-size slot group for each of ``images``.

    ``images[m]`` is the largest number of tokens that the (m+1)-th image of a row may have, ``crops`` the largest
    number of crops that all of a row's images may have together; without it one each.
    """

    text: int
    images: tuple[int, ...] = ()
    crops: int = -1

    def __post_init__(self) -> None:
        if self.crops < 0:
            object.__setattr__(self, "crops", len(self.images))

    @property
    def slots(self) -> int:
        """S, the sequence slots of a row before any drop."""
        return self.text + sum(self.images)


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

    Ratios are cumulative: they count from the original number of tokens, ``int(n * ratio)`` with Python's truncation.
    ``positions="dense"`` renumbers the tokens after each drop as the official code does; ``"original"`` keeps the
    numbers they had before the first drop.

    Raises:
      UserError: lists of different length, layers that do not ascend, ratios that rise or leave 0..1.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    positions: Positions = "dense"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))
        if len(self.layers) != len(self.ratios):
            raise UserError(
                f"{len(self.layers)} drop layers {list(self.layers)} but {len(self.ratios)} ratios "
                f"{list(self.ratios)}: give one ratio for each layer"
            )
        if any(b <= a for a, b in itertools.pairwise(self.layers)) or any(n < 0 for n in self.layers):
            raise UserError(f"drop layers must ascend from 0 on, got {list(self.layers)}")
        if not all(0.0 <= ratio <= 1.0 for ratio in self.ratios):
            raise UserError(f"keep ratios must lie in 0..1, got {list(self.ratios)}")
        if any(b > a for a, b in itertools.pairwise(self.ratios)):
            raise UserError(f"keep ratios are shares of the original tokens and must not rise, got {list(self.ratios)}")
        if self.positions not in ("dense", "original"):
            raise UserError(f"positions must be 'dense' or 'original', got {self.positions!r}")

    @classmethod
    def none(cls) -> "DropSchedule":
        """Dense LLaVA: nothing is dropped."""
        return cls((), ())

    def check(self, num_layers: int) -> None:
        """Raises UserError if a drop falls outside a decoder of ``num_layers`` layers."""
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

    def plan(self, num_layers: int, bucket: Bucket, align: int = 1) -> tuple[Stage, ...]:
        """The stages of a decoder of ``num_layers`` layers for ``bucket``.

        Args:
          align: buffer lengths are rounded up to a multiple of it (flash kernels need 128); counts stay exact.
        """
        stages = []
        ratios = (1.0, *self.ratios)
        for (start, stop), ratio in zip(self.layer_ranges(num_layers), ratios, strict=True):
            slots = bucket.text + sum(keep_count(n, ratio) for n in bucket.images)
            stages.append(Stage(start, stop, ratio, -(-slots // align) * align))
        return tuple(stages)

    def to_json(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "ratios": list(self.ratios), "positions": self.positions}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "DropSchedule":
        return cls(tuple(data["layers"]), tuple(data["ratios"]), data.get("positions", "dense"))


def keep_count(n: int, ratio: float) -> int:
    """Tokens kept of an image that had ``n``: truncated in double precision, so 100 at 0.29 keeps 28."""
    return int(n * ratio)


def keep_table(n_max: int, ratio: float) -> Sequence[int]:
    """``keep_count`` of 0..n_max. Double-precision truncation cannot be had on an accelerator, a table can."""
    return [keep_count(n, ratio) for n in range(n_max + 1)]
