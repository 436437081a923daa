"""Charts of costs and studies, by matplotlib, which the extra ``plots`` installs."""

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

from pdrop_jax.analysis.cost import Cost
from pdrop_jax.errors import UserError
from pdrop_jax.storage import written_aside

ENDINGS = (".png", ".svg", ".pdf")


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure of ``width`` x ``height`` inches and its axes, side by side.

    Raises:
      UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib, which is not installed: pip install 'pdrop-jax[plots]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def cost_plot(costs: Sequence[Cost], num_layers: int) -> Any:
    """Image tokens by layer, and MACs of the prefill by part; dense first, then with drops."""
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
    tokens.legend()
    macs.set(xlabel="MACs of the prefill, T")
    macs.set_yticks(range(len(costs)), ["with drops" if cost.schedule.layers else "dense" for cost in costs])
    macs.legend(fontsize="small")
    return figure


def check_plot_path(path: pathlib.Path) -> None:
    """Raises UserError if no plot has that ending, or there is no such folder."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"{path}: no plot ends in {path.suffix!r}: use {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")


def save_plot(figure: Any, path: pathlib.Path) -> None:
    """Writes ``figure`` in the format that the name ends in; see ``check_plot_path`` for what it raises."""
    check_plot_path(path)
    with written_aside(path) as new:
        figure.savefig(new, dpi=150)
