"""``pdrop export``: write a checkpoint that transformers or the original LLaVA loads."""

import pathlib
from typing import Annotated, Literal

import tyro


def run(
    model: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="MODEL")],
    out: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="OUT")],
    format: Literal["hf", "original"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Export a converted or trained checkpoint to PyTorch. The drop schedule stays behind, PyTorch has no place for it.

    Args:
      model: a checkpoint of ours.
      out: folder to write.
      format: Hugging Face's LlavaForConditionalGeneration, or the original LLaVA code's.
      dtype: to store, without it the checkpoint's own.
    """
    from pdrop_jax.convert.exporter import export

    summary = export(model, out, format, dtype=dtype)
    print(f"{out}: {summary.tensors} tensors, {summary.bytes / 1e6:,.1f} MB, {summary.dtype}, {format}")
