"""``pdrop export``: write a checkpoint that transformers or the original LLaVA loads, or one of ours."""

import contextlib
import pathlib
import tempfile
from typing import Annotated, Literal

import tyro

from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_new_folder


def run(
    model: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="MODEL")],
    out: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="OUT")],
    format: Literal["hf", "original", "pdrop"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    single_file: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Export a converted or trained model. The drop schedule stays behind in PyTorch, which has no place for it.

    Args:
      model: a checkpoint of ours, or the folder of a run: LoRA adapters are merged.
      out: folder to write.
      format: Hugging Face's LlavaForConditionalGeneration, the original LLaVA code's, or ours.
      dtype: to store, without it the checkpoint's own.
      single_file: with --format pdrop, all arrays in one file.
    """
    from pdrop_jax.train.result import is_run, model_of

    if single_file and format != "pdrop":
        raise UserError("--single-file is for --format pdrop")
    check_new_folder(out)
    with contextlib.ExitStack() as at_end:
        if is_run(model):
            scratch = at_end.enter_context(tempfile.TemporaryDirectory(dir=model))
            model = model_of(model, pathlib.Path(scratch))
        if format == "pdrop":
            from pdrop_jax import checkpoint
            from pdrop_jax.model.params import count

            config, params = checkpoint.load(model, dtype=dtype)
            about = checkpoint.training(model)
            checkpoint.save(out, config, params, companions=model, single_file=single_file, training=about)
            print(f"{printable(out)}: {count(params):,} parameters")
            return
        from pdrop_jax.convert.exporter import export

        summary = export(model, out, format, dtype=dtype)
        print(f"{printable(out)}: {summary.tensors} tensors, {summary.bytes / 1e6:,.1f} MB, {summary.dtype}, {format}")
