"""``pdrop convert``: make a checkpoint of ours out of a PyTorch one."""

import pathlib
from typing import Annotated, Literal

import tyro

from pdrop_jax.cli.options import Layers, Ratios, schedule_of


def run(
    source: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="SRC")],
    out: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="OUT")],
    vision: pathlib.Path | None = None,
    tokenizer: pathlib.Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    layers: Layers = None,
    ratios: Ratios = None,
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Convert an original LLaVA or a Hugging Face LLaVA checkpoint.

    Args:
      source: its folder, with config.json and safetensors or .bin files.
      out: folder to write.
      vision: folder of the vision tower, for an original checkpoint that holds none.
      tokenizer: folder of the tokenizer files, without it the checkpoint's.
      dtype: to store, without it float32 if the checkpoint is, otherwise bfloat16.
      layers: drop image tokens after these many layers; without it 8 16 24 if the decoder has more. "none" drops none.
      ratios: share of the image tokens kept at each drop; without it 0.5 0.25 0.125.
      check: compare the logits with the PyTorch model's (needs torch).
    """
    from pdrop_jax.convert.importer import convert

    summary = convert(
        source, out, vision=vision, tokenizer=tokenizer, dtype=dtype, schedule=schedule_of(layers, ratios)
    )
    schedule = summary.config.schedule
    drops = ", ".join(f"{ratio:g} after {n}" for n, ratio in zip(schedule.layers, schedule.ratios, strict=True))
    print(
        f"{out}: {summary.tensors} tensors, {summary.bytes / 1e6:,.1f} MB, {summary.dtype}; "
        f"image tokens kept: {drops or 'all, dense'}"
    )
    if not summary.has_tokenizer:
        print(f"{source} has no tokenizer files: pass --tokenizer DIR or copy them into {out}")
    if check:
        from pdrop_jax.convert.check import compare

        difference, largest = compare(source, out, vision=vision)
        print(f"largest difference to PyTorch {difference:.2e}, largest logit {largest:.2f}")
