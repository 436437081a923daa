"""The ``pdrop`` command in a process of its own, as on a machine without torch, whose import takes seconds."""

import sys

PDROP = [sys.executable, "-c", "import sys; sys.modules['torch'] = None; from pdrop_jax.cli import main; main()"]
