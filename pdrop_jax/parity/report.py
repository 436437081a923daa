"""Rows of the table of ``pdrop check``: the largest errors of a case, and their tolerances."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

TOLERANCE = {"hidden": 1e-4, "scores": 5e-6, "logits": 1e-4, "pixels": 1e-5, "loss": 1e-5, "gradients": 1e-4}  # float32

Figures = dict[str, Any]  # some of the fields of Comparison


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Largest errors of a case; None for what it does not record.

    Attributes:
      hidden: largest absolute difference of hidden states.
      scores: the same for ranking scores.
      logits: the same for logits.
      pixels: the same for pixel statistics.
      loss: the same for the loss.
      gradients: the same for gradients, divided by the reference's largest absolute value + 0.01, so that a tolerance
        of 1e-4 means 1e-4 * absmax + 1e-6.
      kept: whether all kept image tokens are equal.
      tokens: whether all tokens are equal.
      labels: whether all targets of training rows are equal.
      text: whether all rendered prompts are equal.
    """

    case: str
    hidden: float | None = None
    scores: float | None = None
    logits: float | None = None
    pixels: float | None = None
    loss: float | None = None
    gradients: float | None = None
    kept: bool | None = None
    tokens: bool | None = None
    labels: bool | None = None
    text: bool | None = None

    @classmethod
    def worst(cls, case: str, found: Sequence[Figures]) -> "Comparison":
        fields: Figures = {}
        for name in {name for figures in found for name in figures}:
            values = [figures[name] for figures in found if name in figures]
            fields[name] = all(values) if isinstance(values[0], bool) else max(values)
        return cls(case, **fields)

    @property
    def ok(self) -> bool:
        """Whether anything was compared and all of it is equal or within tolerance."""
        found = {
            name: value for name, value in dataclasses.asdict(self).items() if name != "case" and value is not None
        }
        # This form of the comparison puts a NaN out of tolerance.
        return bool(found) and all(v if isinstance(v, bool) else v <= TOLERANCE[name] for name, v in found.items())


def error(ours: Any, theirs: np.ndarray) -> float:
    """Largest absolute difference; infinite if the shapes differ, so nothing is broadcast."""
    ours = np.asarray(ours, np.float32)
    if ours.shape != theirs.shape:
        return float("inf")
    difference = np.abs(ours - theirs).max(initial=0.0)
    return float("inf") if np.isnan(difference) else float(difference)


def table(rows: Sequence[Comparison]) -> str:
    """One line per case with aligned columns; ``-`` for what a case does not record."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "equal" if value else "DIFFERS"
        return f"{value:.1e}"

    names = ["hidden", "scores", "logits", "pixels", "loss", "gradients", "kept", "tokens", "labels", "text"]
    lines = [["case", *names, ""]]
    lines += [[row.case, *(cell(getattr(row, name)) for name in names), "ok" if row.ok else "FAIL"] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
