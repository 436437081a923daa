"""What runs on the host: prompts and pictures become a Batch. numpy only."""

from pdrop_jax.inputs.processor import Processor, Row, TextStream, assemble, choose_bucket

__all__ = ["Processor", "Row", "TextStream", "assemble", "choose_bucket"]
