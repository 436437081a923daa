"""transformers without torch, for processes that use only its tokenizers and image processors.

Where torch is installed, transformers 5 imports all of it for them, and has no setting against that: most of the time
in which a command starts, and half of the memory of a process that loads images.
"""

import importlib
import sys

_wanted = False


def want_no_torch() -> None:
    """Lets this process import transformers without torch, as if it were not installed.

    Only for processes that are ours: transformers keeps what it found, so that its models cannot be used later on.
    torch itself can still be imported, for checkpoints in its own format.
    """
    global _wanted
    _wanted = True


def import_transformers() -> None:
    """Imports transformers as this process wants it. No-op if nothing was said, or if it or torch is there already."""
    if not _wanted or "transformers" in sys.modules or "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # as Python documents it: importing it fails
    try:
        importlib.import_module("transformers.image_processing_utils")
    finally:
        del sys.modules["torch"]
