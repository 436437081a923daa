"""Host-side preprocessing in numpy: prompts and images become a Batch."""

# ruff: noqa: E402  transformers has to be imported in the way that this process wants, before anything else imports it

import os

from pdrop_jax.without_torch import import_transformers

# transformers is used for tokenizers and image processors alone, and would advise to install torch for its models.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
import_transformers()

from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.processor import Processor, TextStream

__all__ = ["Processor", "Row", "TextStream", "assemble", "choose_bucket"]
