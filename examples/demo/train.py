"""Trains the demo model: ``python -m examples.demo.train``, in the root of the repository.

Draws the pictures and writes the untrained model first, unless they already exist. The same command resumes a run
that was stopped or killed.
"""

import pathlib
from typing import Annotated

import tyro

from examples.demo.dataset import CONVERSATIONS, IMAGES, write_dataset
from examples.demo.model import write_start
from pdrop_jax.errors import exit_on_error
from pdrop_jax.train.loop import train
from pdrop_jax.train.recipe import Recipe, load_recipe

RECIPE = pathlib.Path(__file__).parent / "recipe.toml"
PICTURES = 40_000


def prepare(recipe: Recipe) -> None:
    """Writes the untrained model and the pictures where ``recipe`` expects them, unless they exist.

    Raises:
      OSError: the disk is full or not writable.
    """
    start, conversations = pathlib.Path(recipe.model.start), pathlib.Path(recipe.data.conversations or "")
    if not start.exists():
        write_start(start, seed=recipe.run.seed)
    images = pathlib.Path(recipe.data.images or "")
    ours = conversations.name == CONVERSATIONS and images == conversations.parent / IMAGES
    if ours and not conversations.parent.exists():
        write_dataset(conversations.parent, PICTURES, recipe.run.seed)


def run(
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE [KEY=VALUE …]")] = (),
    allow_changes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Train the demo model on pictures of garments, about an hour on one core.

    Args:
      settings: Changes to recipe.toml, such as run.steps=100.
      allow_changes: Resume even though the recipe, the data or the starting model have changed.
    """
    recipe = load_recipe(RECIPE, settings)
    prepare(recipe)
    train(recipe, allow_changes=allow_changes)


if __name__ == "__main__":
    with exit_on_error():
        tyro.cli(run, prog="python -m examples.demo.train")
