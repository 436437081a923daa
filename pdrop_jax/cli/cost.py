"""``pdrop cost``: the cost of a drop schedule, or the schedule for a budget."""

import dataclasses
import json
from typing import Annotated, Any

from pdrop_jax.cli.options import (
    CompressVision,
    ConfigModel,
    File,
    Flag,
    Json,
    Layers,
    MergeSize,
    QuantizeCache,
    Ratios,
    Score,
    compressed,
    unset,
)
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_output
from pdrop_jax.schedule import parse_schedule

MOST_TOKENS = 10**9  # text tokens, or image tokens


def run(
    model: ConfigModel = "llava-1.5-7b",
    layers: Layers = None,
    ratios: Ratios = None,
    compress_vision: CompressVision = None,
    merge_size: MergeSize = None,
    score: Score = None,
    average_tokens: Annotated[float | None, unset("N")] = None,
    macs: Annotated[float | None, unset("N")] = None,
    cache_bytes: Annotated[float | None, unset("N")] = None,
    image_tokens: Annotated[int | None, unset("N")] = None,
    text_tokens: int = 64,
    quantize_cache: QuantizeCache = None,
    plot: File = None,
    overwrite: Flag = False,
    json_output: Json = False,
) -> None:
    """Print the cost of a prompt with one image, dense and with drops.

    KV cache sizes are for bfloat16, or with --quantize-cache for int8 or int4, half a byte as on a TPU or GPU.

    With a budget (--average-tokens, --macs or --cache-bytes), the drop ratios are computed, and --layers alone sets
    where tokens are dropped.

    Args:
      average_tokens: Budget of image tokens per layer, averaged over layers.
      macs: Budget of multiply-accumulates (MACs) of the language model, by the paper's formula.
      cache_bytes: Budget of KV cache bytes for the image tokens.
      image_tokens: Number of image tokens (default: the model's maximum for one image).
      text_tokens: Number of text tokens of the prompt.
      plot: Plot the costs to this file (.png, .svg or .pdf).
      overwrite: Replace the --plot file if it exists.
    """
    if plot:
        from pdrop_jax.analysis.plots import PLOTS, check_matplotlib

        check_matplotlib()
        check_output(plot, overwrite=overwrite, inputs=[model], endings=PLOTS)

    from pdrop_jax.analysis.budget import schedule_for_budget
    from pdrop_jax.analysis.cost import cost_of
    from pdrop_jax.config import VisionConfig
    from pdrop_jax.convert.pretrained import config_of
    from pdrop_jax.inputs.anyres import largest_picture
    from pdrop_jax.inputs.buckets import bucket_for
    from pdrop_jax.model.scores import find_score
    from pdrop_jax.schedule import DropSchedule

    config = compressed(config_of(model), compress_vision, merge_size).with_cache_dtype(quantize_cache)
    if image_tokens is None and not isinstance(config.vision, VisionConfig):
        raise UserError(f"{printable(model)} takes pictures of any size: pass --image-tokens, for example 1024")
    tokens = largest_picture(config) if image_tokens is None else image_tokens
    if tokens < 1 or text_tokens < 1:
        raise UserError(f"--image-tokens and --text-tokens must be at least 1, got {tokens} and {text_tokens}")
    if max(tokens, text_tokens) > MOST_TOKENS:
        raise UserError(
            f"--image-tokens and --text-tokens must be at most {MOST_TOKENS:,}, got {tokens:,} and {text_tokens:,}"
        )
    if (average_tokens, macs, cache_bytes) != (None, None, None):
        if ratios is not None:
            raise UserError("a budget determines the ratios: leave out --ratios")
        drops = None if layers is None else parse_schedule(layers, (0.0,) * len(layers))
        schedule = schedule_for_budget(
            config.text,
            average_tokens=average_tokens,
            macs=macs,
            cache_bytes=cache_bytes,
            layers=None if drops is None else drops.layers,
            image_tokens=tokens,
        )
    else:
        schedule = parse_schedule(layers, ratios) or config.schedule
    if score:
        schedule = dataclasses.replace(schedule, score=score)
        find_score(dataclasses.replace(config, schedule=schedule))
    bucket = bucket_for(text_tokens, (tokens,), config)
    configs = dict.fromkeys(dataclasses.replace(config, schedule=each) for each in (DropSchedule.none(), schedule))
    costs = [cost_of(each, bucket) for each in configs]
    if plot:
        from pdrop_jax.analysis.plots import cost_plot, save_plot

        save_plot(cost_plot(costs, config.text.num_layers), plot, overwrite)
    if json_output:
        print(json.dumps({"model": model, "costs": [_as_json(cost) for cost in costs]}))
        return
    print(f"{printable(model)}, {text_tokens} text tokens and {tokens} image tokens\n\n{_table(costs)}")
    if schedule.layers:
        print(f"\n--layers {' '.join(map(str, schedule.layers))} --ratios {' '.join(map(str, schedule.ratios))}")


def _as_json(cost: Any) -> dict[str, Any]:
    prefill = dataclasses.asdict(cost.prefill) | {"total": cost.prefill.total}
    return dataclasses.asdict(cost) | {"schedule": cost.schedule.to_json(), "prefill": prefill}


def _table(costs: list[Any]) -> str:
    """A Markdown table with a column for each schedule; figures that drops change show their share of the dense one."""

    def row(name: str, figures: list[float], unit: str = "T", size: float = 1e12) -> list[str]:
        shares = [f" ({figure / figures[0]:.1%})" if figure != figures[0] else "" for figure in figures]
        return [name, *(f"{figure / size:,.4g} {unit}{share}" for figure, share in zip(figures, shares, strict=True))]

    parts = [cost.prefill for cost in costs]
    rows = [
        ["", *("PyramidDrop" if cost.schedule.layers else "dense" for cost in costs)],
        ["---"] * (len(costs) + 1),
        ["image tokens", *(" -> ".join(map(str, cost.image_tokens)) for cost in costs)],
        row("image tokens, average over layers", [cost.average_tokens for cost in costs], "tokens", 1),
        row("MACs by the paper's formula", [cost.paper_macs for cost in costs]),
        row("prefill MACs", [part.total for part in parts]),
        row("- vision tower", [part.vision for part in parts]),
        ["- vision tower, share", *(f"{part.vision / part.total:.1%}" for part in parts)],
        row("- projector", [part.projector for part in parts]),
        row("- decoder", [part.decoder for part in parts]),
        row("- decoder, text alone", [cost.text_macs for cost in costs]),
        ["- ranking", *(f"{part.ranking / 1e9:,.4g} G" for part in parts)],
        row("- head", [part.head for part in parts], "G", 1e9),
        row("prefill MACs with causal attention", [cost.prefill.total - cost.causal_macs for cost in costs]),
        row("KV cache of the image tokens", [cost.image_cache_bytes for cost in costs], "MiB", 2**20),
        row("KV cache", [cost.cache_bytes for cost in costs], "MiB", 2**20),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
