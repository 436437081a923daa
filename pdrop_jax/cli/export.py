"""``pdrop export``: export a model for transformers, the original LLaVA code or pdrop."""

import contextlib
import pathlib
import tempfile
from typing import Annotated, Any, Literal

import tyro

from pdrop_jax.cli.options import Flag, unset
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_new_folder
from pdrop_jax.paths import as_path, in_bucket


def run(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    out: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="OUT")],
    format: Literal["hf", "original", "pdrop"],
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, unset("{float32,bfloat16,float16}")] = None,
    single_file: Flag = False,
    push_to_hub: Annotated[str | None, unset("OWNER/NAME")] = None,
    private: Flag = False,
) -> None:
    """Export a converted or trained model. PyTorch formats do not store the drop schedule.

    Args:
      model: A model as for pdrop generate, or a training run folder; LoRA adapters are merged.
      out: Output folder; it must not exist.
      format: Target format: hf (transformers, with a chat template), original (the original LLaVA code) or pdrop.
      dtype: Dtype of the stored arrays (default: the checkpoint's).
      single_file: Store all arrays in one file (only with --format pdrop).
      push_to_hub: Upload OUT with a model card to this repository on the Hugging Face Hub, which is made unless it
        exists. Weights in it that the export does not replace are removed.
      private: Make the repository private if it is new.
    """
    from pdrop_jax.config import LlavaConfig
    from pdrop_jax.train.result import is_run, model_of

    if single_file and format != "pdrop":
        raise UserError("--single-file requires --format pdrop")
    if private and push_to_hub is None:
        raise UserError("--private requires --push-to-hub OWNER/NAME")
    if push_to_hub is not None and in_bucket(out):
        raise UserError("--push-to-hub uploads a local folder: write to one and copy it to the bucket afterwards")
    check_new_folder(out)

    from pdrop_jax.convert import upload
    from pdrop_jax.convert.cache import model_folder

    with contextlib.ExitStack() as at_end:
        if is_run(as_path(model)):
            beside = None if in_bucket(model) else model
            scratch = at_end.enter_context(tempfile.TemporaryDirectory(dir=beside))
            folder = model_of(as_path(model), pathlib.Path(scratch))
        else:
            folder = as_path(model_folder(model))
        config = LlavaConfig.load(folder)
        if push_to_hub is not None:
            upload.make_repository(push_to_hub, private)
        print(_export(folder, out, format, dtype, single_file))
        if config.standby and format != "pdrop":
            print("Its standby tokens are left out, because no other library loads them: mode focus is what it was")
        if push_to_hub is not None:
            upload.write_card(out, folder, push_to_hub, format)
            print(printable(upload.upload(out, push_to_hub)))


def _export(model: pathlib.Path, out: pathlib.Path, format: Any, dtype: Any, single_file: bool) -> str:
    """Writes ``out`` and returns what to print about it."""
    if format == "pdrop":
        from pdrop_jax import checkpoint
        from pdrop_jax.convert.names import ONLY_HERE
        from pdrop_jax.model.compression import is_compressed
        from pdrop_jax.model.params import count

        config, params = checkpoint.load(model, dtype=dtype)
        about = checkpoint.training(model)
        checkpoint.save(out, config, params, companions=model, single_file=single_file, training=about)
        only_here = f"; {ONLY_HERE}" if is_compressed(config) else ""
        return f"{printable(out)}: {count(params):,} parameters{only_here}"
    from pdrop_jax.convert.exporter import export

    summary = export(model, out, format, dtype=dtype)
    return f"{printable(out)}: {summary.tensors} tensors, {summary.bytes / 1e6:,.1f} MB, {summary.dtype}, {format}"
