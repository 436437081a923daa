"""What runs on the host: prompts and pictures become a Batch. numpy only."""

from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.processor import Processor, TextStream

__all__ = ["Processor", "Row", "TextStream", "assemble", "choose_bucket"]
