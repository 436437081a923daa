"""``pdrop convert``: convert a PyTorch checkpoint, or build a new LLaVA from its parts."""

import dataclasses
import functools
import pathlib
from typing import Annotated, Literal

import tyro

from pdrop_jax.cli.options import LAYERS, CompressVision, File, Flag, MergeSize, Source, compressed, unset
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_new_folder
from pdrop_jax.paths import as_path
from pdrop_jax.schedule import parse_schedule


def run(
    # With --llm there is one folder, OUT, and it comes first.
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[SRC]")],
    out: Annotated[
        tyro.conf.Positional[pathlib.Path | None], tyro.conf.arg(metavar="OUT", help_behavior_hint=" ")
    ] = None,
    llm: Source = None,
    vision: Source = None,
    projector: File = None,
    projector_type: Annotated[Literal["mlp2x_gelu", "linear"] | None, unset("{mlp2x_gelu,linear}")] = None,
    seed: int = 0,
    template: Annotated[str | None, unset("NAME")] = None,
    tokenizer: Source = None,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, unset("{float32,bfloat16}")] = None,
    layers: Annotated[tuple[str, ...] | None, unset(LAYERS)] = None,
    ratios: Annotated[tuple[float, ...] | None, unset("R [R …]")] = None,
    standby: Annotated[Literal[8, 16, 32] | None, unset("{8,16,32}")] = None,
    compress_vision: CompressVision = None,
    merge_size: MergeSize = None,
    check: Flag = False,
) -> None:
    """Convert a LLaVA checkpoint (original or Hugging Face), or build one to train: --llm DIR --vision DIR OUT.

    Wherever a model is named, OWNER/NAME[@REVISION] is one on the Hugging Face Hub, unless there is such a folder.

    Args:
      source: Checkpoint folder with config.json and safetensors or .bin weights, or its id on the Hub (omit it with
        --llm).
      out: Output folder; it must not exist.
      llm: A LLaMA, Mistral, Qwen2 or Qwen3 language model; a new LLaVA is built from it and --vision.
      vision: The vision tower, for --llm or for an original checkpoint without one (default: the one that the
        checkpoint names).
      projector: Pretrained projector (mm_projector.bin or .safetensors) that replaces the checkpoint's or the newly
        initialized one.
      projector_type: Projector architecture with --llm (default: that of --projector, else mlp2x_gelu).
      seed: RNG seed for initializing a new projector or new standby tokens.
      template: Prompt template (default: "own", the checkpoint's own chat template; without one vicuna_v1 for LLaMA,
        llama_3 for Llama 3, mistral_instruct for Mistral, qwen for Qwen2 and Qwen3).
      tokenizer: Where the tokenizer files are (default: the checkpoint's or the language model's).
      dtype: Dtype of the stored arrays (default: float32 if the checkpoint is float32, otherwise bfloat16).
      layers: Numbers of layers after which image tokens are dropped (default: 8 16 24 if the decoder has more than 24
        layers); "none" disables dropping.
      ratios: Fraction of each image's original tokens kept after each drop (default: 0.5 0.25 0.125).
      standby: Add so many standby tokens to the vision tower; they have to be trained before use.
      check: Compare the logits with those of the PyTorch model (requires torch).
    """
    from pdrop_jax.config import StandbyConfig
    from pdrop_jax.convert.importer import write
    from pdrop_jax.convert.sources import open_parts, open_source

    schedule = parse_schedule(layers, ratios)
    if check and (compress_vision, merge_size) != (None, None):
        raise UserError("--check compares with the PyTorch model, which compresses nothing: leave out --check")
    change = functools.partial(compressed, after=compress_vision, merge_size=merge_size)
    if llm is not None:
        if out is not None:
            raise UserError(
                f"Both SRC ({source}) and --llm were given. Usage: pdrop convert --llm DIR --vision DIR OUT"
            )
        if vision is None:
            raise UserError("--llm requires a vision tower: add --vision DIR")
        check_new_folder(source)
        kinds = {"linear": 1, "mlp2x_gelu": 2, None: None}
        out = as_path(source)
        opened = open_parts(
            llm,
            vision,
            schedule,
            projector=projector,
            projector_layers=kinds[projector_type],
            seed=seed,
            change=change,
        )
    else:
        if out is None:
            raise UserError("Missing OUT. Usage: pdrop convert SRC OUT, or pdrop convert --llm DIR --vision DIR OUT")
        check_new_folder(out)
        if projector_type is not None:
            raise UserError(
                "--projector-type requires --llm; the projector type of a checkpoint is set by its config.json"
            )
        opened = open_source(source, vision, schedule, projector=projector, change=change)
    if standby is not None:
        config = dataclasses.replace(opened.config, standby=StandbyConfig(standby))
        opened = dataclasses.replace(opened, config=config)
    summary = write(opened, out, tokenizer=tokenizer, dtype=dtype, template=template, seed=seed)
    schedule = summary.config.schedule
    drops = ", ".join(f"{ratio:g} after {n}" for n, ratio in zip(schedule.layers, schedule.ratios, strict=True))
    print(
        f"{printable(out)}: {summary.tensors} tensors, {summary.bytes / 1e6:,.1f} MB, {summary.dtype}; "
        f"image tokens kept: {drops or 'all, dense'}; prompt template: {summary.config.template}"
    )
    if (compress_vision, merge_size) != (None, None):
        print("The vision tower or its connector was changed: train the model before use")
    if llm is not None and projector is None:
        print(f"The projector is randomly initialized (seed {seed}); train it before use")
    if standby is not None:
        print(f"Its {standby} standby tokens are untrained (seed {seed}): train them before use")
    if not summary.has_tokenizer:
        print(printable(f"{opened.location.name} has no tokenizer files: pass --tokenizer DIR or copy them into {out}"))
    if check:
        from pdrop_jax.convert.check import compare

        difference, largest = compare(opened, out)
        print(f"largest difference to PyTorch {difference:.2e}, largest logit {largest:.2f}")
