"""``pdrop export``: export a model for transformers, the original LLaVA code or pdrop."""

import contextlib
import pathlib
import tempfile
from typing import Annotated, Literal

import tyro

from pdrop_jax.cli.options import Flag, unset
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_new_folder
from pdrop_jax.paths import in_bucket


def run(
    model: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="MODEL")],
    out: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="OUT")],
    format: Literal["hf", "original", "pdrop"],
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, unset("{float32,bfloat16,float16}")] = None,
    single_file: Flag = False,
) -> None:
    """Export a converted or trained model. PyTorch formats do not store the drop schedule.

    Args:
      model: A pdrop checkpoint or a training run folder; LoRA adapters are merged.
      out: Output folder; it must not exist.
      format: Target format: hf (transformers, with a chat template), original (the original LLaVA code) or pdrop.
      dtype: Dtype of the stored arrays (default: the checkpoint's).
      single_file: Store all arrays in one file (only with --format pdrop).
    """
    from pdrop_jax.train.result import is_run, model_of

    if single_file and format != "pdrop":
        raise UserError("--single-file requires --format pdrop")
    check_new_folder(out)
    with contextlib.ExitStack() as at_end:
        if is_run(model):
            beside = None if in_bucket(model) else model
            scratch = at_end.enter_context(tempfile.TemporaryDirectory(dir=beside))
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
