"""``pdrop check``: replay recorded reference vectors."""

import pathlib
from typing import Annotated

import tyro

from pdrop_jax.cli.options import Mesh, device_mesh, unset
from pdrop_jax.errors import printable


def run(
    folder: tyro.conf.Positional[pathlib.Path],
    case: Annotated[tuple[str, ...], unset("NAME [NAME …]", "all")] = (),
    mesh: Mesh = (),
) -> int:
    """Replay recorded reference vectors and print the largest error of each case. The exit code is 1 if a case fails.

    Args:
      folder: Reference vectors, in the format of tests/golden/README.md.
      case: Replay only these cases.
    """
    from pdrop_jax.convert.importer import read
    from pdrop_jax.convert.names import torch_arrays
    from pdrop_jax.parity.replay import Reference, check
    from pdrop_jax.parity.report import TOLERANCE, table

    rows = check(folder, Reference(read, torch_arrays), case, device_mesh(mesh))
    print(printable(table(rows), keep="\n"))
    print(
        "tolerances: "
        + ", ".join(f"{name} {value:.0e}" for name, value in TOLERANCE.items())
        + "; everything else is exact"
    )
    return 0 if all(row.ok for row in rows) else 1
