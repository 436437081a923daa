"""What several subcommands share: options of schedule and mesh, and progress on a terminal."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import tyro

from pdrop_jax.errors import UserError
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.schedule import PRESETS

Layers = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar=f"N [N …]|none|{'|'.join(PRESETS)}")]
Mesh = Annotated[tuple[str, ...], tyro.conf.arg(metavar="AXIS=N [AXIS=N …]")]
SamplingOptions = Annotated[Sampling, tyro.conf.arg(name="")]  # --max-new-tokens, --temperature, …
Ratios = Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="R [R …]")]


def mesh_sizes(mesh: tuple[str, ...]) -> dict[str, int]:
    """Devices along each axis of ``--mesh data=1 fsdp=8 tensor=1``."""
    try:
        sizes = {axis: int(size) for axis, size in (item.split("=") for item in mesh)}
        if len(sizes) < len(mesh):
            raise ValueError
        return sizes
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
