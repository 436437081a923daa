"""Host-side preprocessing in numpy: prompts and images become a Batch."""

from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.processor import Processor, TextStream

__all__ = ["Processor", "Row", "TextStream", "assemble", "choose_bucket"]
