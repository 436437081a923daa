"""What several subcommands share: options of schedule and mesh, and progress on a terminal."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import tyro

from pdrop_jax.errors import UserError
from pdrop_jax.schedule import PRESETS, DropSchedule

Layers = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar=f"N [N …]|none|{'|'.join(PRESETS)}")]
Mesh = Annotated[tuple[str, ...], tyro.conf.arg(metavar="AXIS=N [AXIS=N …]")]
Ratios = Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="R [R …]")]


def schedule_of(
    layers: tuple[str, ...] | None, ratios: tuple[float, ...] | None, score: str | None = None
) -> DropSchedule | None:
    """The schedule of ``--layers``, ``--ratios`` and ``--score``; None when neither of the first two is given.

    ``--layers none`` is dense, ``--layers NAME`` one of ``schedule.PRESETS``.
    """
    if layers is None and ratios is None:
        if score is not None:
            raise UserError("--score is of a schedule: give --layers too, for the paper's own --layers paper")
        return None
    named = {"none": DropSchedule.none(), **PRESETS}
    if ratios is None and layers is not None and len(layers) == 1 and layers[0] in named:
        schedule = named[layers[0]]
        return schedule if score is None else dataclasses.replace(schedule, score=score)
    if layers is None or ratios is None:
        raise UserError(
            "--layers and --ratios belong together: give both, neither, or --layers alone with one of "
            f"{', '.join(named)}"
        )
    try:
        return DropSchedule(tuple(int(layer) for layer in layers), ratios, score=score or "pyramiddrop")
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--layers takes whole numbers, got {' '.join(layers)}") from None


def mesh_sizes(mesh: tuple[str, ...]) -> dict[str, int]:
    """Devices along each axis of ``--mesh data=1 fsdp=8 tensor=1``."""
    try:
        return {axis: int(size) for axis, size in (item.split("=") for item in mesh)}
    except ValueError:
        raise UserError(f"--mesh takes axes with their sizes, as fsdp=8 tensor=2, got {' '.join(mesh)}") from None


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Says what is going on, on a terminal only."""
    began = time.perf_counter()
    if sys.stderr.isatty():
        print(f"{what} …", file=sys.stderr, flush=True)
    yield
    if sys.stderr.isatty():
        print(f"{what}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
