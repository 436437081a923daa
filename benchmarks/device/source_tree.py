"""Lets a benchmark run from a source tree on a machine where pdrop-jax is not installed."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def make_importable() -> None:
    """Makes ``pdrop_jax.train`` and ``pdrop_jax.convert`` importable.

    The installation maps the folders train/ and convert/ into the package (see pyproject.toml). Without it they are
    merely beside the package, so the folder that holds all three is added to where the package looks for its modules.
    """
    import pdrop_jax

    if any(importlib.util.find_spec(f"pdrop_jax.{name}") is None for name in ("train", "convert")):
        pdrop_jax.__path__.append(str(ROOT))
