"""``python -m examples.demo OUT``: write the demo's training set."""

import pathlib
from typing import Annotated

import tyro

from examples.demo.dataset import write_dataset
from pdrop_jax.errors import exit_on_error


def run(
    out: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="OUT")],
    pictures: int = 40_000,
    seed: int = 0,
) -> None:
    """Write grids of Fashion-MNIST photos with questions and answers, as a data set in LLaVA's format.

    Args:
      out: New folder for conversations.json and images/ (about 7 KB per picture).
      pictures: Number of pictures, each with eight questions.
      seed: RNG seed for the pictures and questions.
    """
    write_dataset(out, pictures, seed)
    print(f"{out}: {pictures} pictures")


if __name__ == "__main__":
    with exit_on_error():
        tyro.cli(run, prog="python -m examples.demo")
