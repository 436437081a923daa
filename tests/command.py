"""The ``pdrop`` command in a process of its own."""

import sys

PDROP = [sys.executable, "-c", "from pdrop_jax.cli import main; main()"]
