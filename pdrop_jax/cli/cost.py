"""``pdrop cost``: what a schedule costs, or the schedule for a budget."""

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import tyro

from pdrop_jax.analysis.budget import schedule_for_budget
from pdrop_jax.cli.options import ConfigModel, Layers, Ratios
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_output
from pdrop_jax.schedule import parse_schedule

MOST_TOKENS = 10**9  # of text, or of an image


def run(
    model: ConfigModel = "llava-1.5-7b",
    layers: Layers = None,
    ratios: Ratios = None,
    score: str | None = None,
    average_tokens: float | None = None,
    macs: float | None = None,
    cache_bytes: float | None = None,
    image_tokens: int | None = None,
    text_tokens: int = 64,
    plot: pathlib.Path | None = None,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Print what a prompt with one image costs, dense and with drops. A cache's numbers are bfloat16.

    With a budget for the image tokens the ratios are found; --layers alone then says where to drop.

    Args:
      layers: drop image tokens after these many layers; without it the model's own schedule. Also paper, tokens-192,
        tokens-128 or tokens-64, schedules for 32 layers.
      ratios: share of the image tokens kept at each drop.
      score: what tokens are chosen by.
      average_tokens: budget, image tokens that a layer sees, averaged over layers.
      macs: budget, multiply-accumulates of the language model by the paper's formula.
      cache_bytes: budget, keys and values of the image tokens.
      image_tokens: of the image; without it the most that a picture has.
      text_tokens: of the prompt.
      plot: file to draw the costs into (.png, .svg or .pdf).
      overwrite: replace the file of --plot if it is there.
      json_output: print one JSON object instead of a table.
    """
    if plot:
        from pdrop_jax.analysis.plots import PLOTS, check_matplotlib

        check_matplotlib()
        check_output(plot, overwrite=overwrite, inputs=[model], endings=PLOTS)

    from pdrop_jax.analysis.cost import cost_of
    from pdrop_jax.config import config_of
    from pdrop_jax.inputs.anyres import levels
    from pdrop_jax.inputs.buckets import bucket_for
    from pdrop_jax.model.scores import find_score
    from pdrop_jax.schedule import DropSchedule

    config = config_of(model)
    tokens = levels(config)[-1][1] if image_tokens is None else image_tokens
    if tokens < 1 or text_tokens < 1:
        raise UserError(f"need at least one image token and one text token, got {tokens} and {text_tokens}")
    if max(tokens, text_tokens) > MOST_TOKENS:
        raise UserError(f"at most {MOST_TOKENS:,} tokens are counted, got {tokens:,} and {text_tokens:,}")
    if (average_tokens, macs, cache_bytes) != (None, None, None):
        if ratios is not None:
            raise UserError("a budget finds the ratios: leave out --ratios")
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
    schedules = dict.fromkeys((DropSchedule.none(), schedule))
    costs = [cost_of(dataclasses.replace(config, schedule=each), bucket) for each in schedules]
    if plot:
        from pdrop_jax.analysis.plots import cost_plot, save_plot

        save_plot(cost_plot(costs, config.text.num_layers), plot, overwrite)
    if json_output:
        print(json.dumps({"model": model, "costs": [_as_json(cost) for cost in costs]}))
        return
    print(f"{printable(model)}, {text_tokens} tokens of text and {tokens} of an image\n\n{_table(costs)}")
    if schedule.layers:
        print(f"\n--layers {' '.join(map(str, schedule.layers))} --ratios {' '.join(map(str, schedule.ratios))}")


def _as_json(cost: Any) -> dict[str, Any]:
    prefill = dataclasses.asdict(cost.prefill) | {"total": cost.prefill.total}
    return dataclasses.asdict(cost) | {"schedule": cost.schedule.to_json(), "prefill": prefill}


def _table(costs: list[Any]) -> str:
    """A column for each schedule; the share of the dense figure behind a figure that a drop changes."""

    def row(name: str, figures: list[float], unit: str = "T", size: float = 1e12) -> list[str]:
        shares = [f" ({figure / figures[0]:.1%})" if figure != figures[0] else "" for figure in figures]
        return [name, *(f"{figure / size:,.4g} {unit}{share}" for figure, share in zip(figures, shares, strict=True))]

    parts = [cost.prefill for cost in costs]
    rows = [
        ["", *("PyramidDrop" if cost.schedule.layers else "dense" for cost in costs)],
        ["---"] * (len(costs) + 1),
        ["image tokens", *(" -> ".join(map(str, cost.image_tokens)) for cost in costs)],
        row("average over layers", [cost.average_tokens for cost in costs], "tokens", 1),
        row("MACs by the paper's formula", [cost.paper_macs for cost in costs]),
        row("all MACs of the prefill", [part.total for part in parts]),
        row("vision tower", [part.vision for part in parts]),
        row("projector", [part.projector for part in parts]),
        row("decoder", [part.decoder for part in parts]),
        row("of it what the text alone would cost", [cost.text_macs for cost in costs]),
        ["ranking", *(f"{part.ranking / 1e9:,.4g} G" for part in parts)],
        row("head", [part.head for part in parts], "G", 1e9),
        row("all, attention counted as causal", [cost.prefill.total - cost.causal_macs for cost in costs]),
        row("KV cache of the image", [cost.image_cache_bytes for cost in costs], "MiB", 2**20),
        row("KV cache", [cost.cache_bytes for cost in costs], "MiB", 2**20),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
