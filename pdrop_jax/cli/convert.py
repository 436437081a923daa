"""``pdrop convert``: make a checkpoint of ours out of a PyTorch one, or out of the parts of one."""

import pathlib
from typing import Annotated, Literal

import tyro

from pdrop_jax.cli.options import Layers, Ratios
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_new_folder
from pdrop_jax.schedule import parse_schedule


def run(
    # With --llm there is one folder, OUT, and it comes first.
    source: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="[SRC]")],
    out: Annotated[
        tyro.conf.Positional[pathlib.Path | None], tyro.conf.arg(metavar="OUT", help_behavior_hint=" ")
    ] = None,
    llm: pathlib.Path | None = None,
    vision: pathlib.Path | None = None,
    projector: pathlib.Path | None = None,
    projector_type: Literal["mlp2x_gelu", "linear"] | None = None,
    seed: int = 0,
    template: str | None = None,
    tokenizer: pathlib.Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    layers: Layers = None,
    ratios: Ratios = None,
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Convert an original LLaVA or a Hugging Face LLaVA checkpoint, or make one to train: --llm DIR --vision DIR OUT.

    Args:
      source: its folder, with config.json and safetensors or .bin files; left out with --llm.
      out: folder to write.
      llm: folder of a LLaMA, Mistral or Qwen2 language model, to make a LLaVA of it and a vision tower.
      vision: folder of the vision tower, for --llm or an original checkpoint that holds none.
      projector: file of a pretrained projector, mm_projector.bin or .safetensors, in place of the checkpoint's or a new
        one.
      projector_type: of the projector with --llm; without it that of --projector or mlp2x_gelu.
      seed: of a new projector.
      template: of the conversations; without it vicuna_v1 for LLaMA, llama_3 for Llama 3, mistral_instruct for Mistral,
        qwen for Qwen2.
      tokenizer: folder of the tokenizer files, without it the checkpoint's or the language model's.
      dtype: to store, without it float32 if the checkpoint is, otherwise bfloat16.
      layers: drop image tokens after these many layers; without it 8 16 24 if the decoder has more. "none" drops none.
      ratios: share of the image tokens kept at each drop; without it 0.5 0.25 0.125.
      check: compare the logits with the PyTorch model's (needs torch).
    """
    from pdrop_jax.convert.importer import write
    from pdrop_jax.convert.sources import open_parts, open_source

    schedule = parse_schedule(layers, ratios)
    if llm is not None:
        if out is not None:
            raise UserError(f"{source} and --llm are two sources: give one, pdrop convert --llm DIR --vision DIR OUT")
        if vision is None:
            raise UserError("--llm needs a vision tower: pass its folder, --vision DIR")
        check_new_folder(source)
        kinds = {"linear": 1, "mlp2x_gelu": 2, None: None}
        out = source
        opened = open_parts(
            llm, vision, schedule, projector=projector, projector_layers=kinds[projector_type], seed=seed
        )
    else:
        if out is None:
            raise UserError(f"{source} alone says not what to do: pdrop convert SRC OUT, or --llm DIR --vision DIR OUT")
        check_new_folder(out)
        if projector_type is not None:
            raise UserError("--projector-type is for --llm: a checkpoint's config.json says which projector it has")
        opened = open_source(source, vision, schedule, projector=projector)
    summary = write(opened, out, tokenizer=tokenizer, dtype=dtype, template=template)
    schedule = summary.config.schedule
    drops = ", ".join(f"{ratio:g} after {n}" for n, ratio in zip(schedule.layers, schedule.ratios, strict=True))
    print(
        f"{printable(out)}: {summary.tensors} tensors, {summary.bytes / 1e6:,.1f} MB, {summary.dtype}; "
        f"image tokens kept: {drops or 'all, dense'}"
    )
    if llm is not None and projector is None:
        print(f"its projector is new (seed {seed}): it knows nothing before it is trained")
    if not summary.has_tokenizer:
        print(printable(f"{opened.folder} has no tokenizer files: pass --tokenizer DIR or copy them into {out}"))
    if check:
        from pdrop_jax.convert.check import compare

        difference, largest = compare(opened, out)
        print(f"largest difference to PyTorch {difference:.2e}, largest logit {largest:.2f}")
