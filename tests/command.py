"""The ``pdrop`` command in a process of its own, which like a user's has no torch: transformers would import it."""

import sys

WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
"""
PDROP = [sys.executable, "-c", WITHOUT_TORCH + "from pdrop_jax.cli import main; main()"]
