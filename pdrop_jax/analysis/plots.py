"""Plots of costs and studies, drawn with matplotlib (the extra ``plots``)."""

import importlib.util
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from pdrop_jax.analysis.cost import Cost
from pdrop_jax.analysis.effects import Mean
from pdrop_jax.analysis.study import Study
from pdrop_jax.errors import UserError
from pdrop_jax.io import check_output, write_file

PLOTS = (".png", ".svg", ".pdf")


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure of ``width`` x ``height`` inches and its axes, side by side.

    Raises:
      UserError: see ``check_matplotlib``.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def check_matplotlib() -> None:
    """Raises UserError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib, which is not installed: pip install 'pdrop-jax[plots]'")


def cost_plot(costs: Sequence[Cost], num_layers: int) -> Any:
    """Image tokens of each layer, and prefill MACs of each part of the model; dense first, then with drops."""
    figure, (tokens, macs) = new_figure(9, 3.5, panels=2)
    for number, cost in enumerate(costs):
        name = "with drops" if cost.schedule.layers else "dense"
        edges = [0, *cost.schedule.layers, num_layers]
        tokens.stairs(cost.image_tokens, edges, label=name, linewidth=2)
        left = 0.0
        for colour, part in enumerate(("vision", "projector", "decoder", "ranking", "head")):
            size = getattr(cost.prefill, part) / 1e12
            macs.barh(number, size, left=left, color=f"C{colour}", label=None if number else part)
            left += size
    tokens.set(xlabel="layer", ylabel="image tokens", ylim=(0, None))
    tokens.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    tokens.legend()
    macs.set(xlabel="MACs of the prefill, T")
    macs.set_yticks(range(len(costs)), ["with drops" if cost.schedule.layers else "dense" for cost in costs])
    macs.legend(fontsize="small")
    return figure


def save_plot(figure: Any, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Writes ``figure`` in the format that the name ends in, one of ``PLOTS``; see ``figures.save_picture``."""
    target = check_output(path, overwrite=overwrite, endings=PLOTS)
    data = io.BytesIO()  # on a full disk matplotlib raises AttributeError while it closes a PDF
    figure.savefig(data, format=pathlib.Path(path).suffix[1:].lower(), dpi=150)
    write_file(target, data.getvalue(), overwrite)


def study_plot(study: Study) -> Any:
    """Answers changed by a single drop, by layer and ratio; by each score and control; and by noise."""
    figure, (drops, others) = new_figure(11, 4.2, panels=2)
    noise = study.group("noise")
    ratios = sorted({row.setting.schedule.ratios[0] for row in study.group("one drop")})
    for ratio in ratios:
        rows = [row for row in study.group("one drop") if row.setting.schedule.ratios == (ratio,)]
        at = [row.setting.schedule.layers[0] for row in rows]
        drops.errorbar(at, *_bars([row.flipped for row in rows]), marker="o", capsize=3, label=f"keeping {ratio:.0%}")
    for number, row in enumerate(noise):
        style = (0, (1 + 2 * number, 2))
        drops.axhline(100 * row.flipped.value, color="grey", linestyle=style, label=row.setting.name)
    drops.set(xlabel="layers before the drop", ylabel="answers changed, %", ylim=(0, None))
    drops.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    drops.legend(fontsize="small")
    rows = [*study.group("scores"), *study.group("controls"), *noise]
    values, errors = _bars([row.flipped for row in rows])
    colours = {"scores": "C0", "controls": "C1", "noise": "grey"}
    others.barh(range(len(rows)), values, xerr=errors, color=[colours[row.setting.group] for row in rows], capsize=3)
    others.set_yticks(range(len(rows)), [row.setting.name for row in rows])
    others.invert_yaxis()
    others.set(xlabel="answers changed, %", title="scores, controls and noise")
    return figure


def _bars(means: Sequence[Mean]) -> tuple[list[float], list[list[float]]]:
    """Percentages, and the lengths of their error bars below and above."""
    sides = [[mean.value - mean.low for mean in means], [mean.high - mean.value for mean in means]]
    return [100 * mean.value for mean in means], [[max(0.0, 100 * side) for side in each] for each in sides]
