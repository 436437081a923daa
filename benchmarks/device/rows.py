"""The rows of figures that all parts yield, and what they call the models."""

from typing import Any

Row = dict[str, Any]
DENSE, DROPS, TORCH = "dense", "PyramidDrop", "torch, dense"
INT8 = tuple(f"{model}, int8 weights" for model in (DENSE, DROPS))
