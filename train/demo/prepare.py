"""What ``pdrop train demo`` needs before it can begin."""

import pathlib

from pdrop_jax.train.recipe import Recipe

from .dataset import CONVERSATIONS, IMAGES, write_dataset
from .model import write_start

PICTURES = 40_000


def prepare(recipe: Recipe) -> None:
    """Writes the untrained model and the pictures where ``recipe`` looks for them, unless something is there.

    Raises:
      OSError: the disk is full or may not be written.
    """
    start, conversations = pathlib.Path(recipe.model.start), pathlib.Path(recipe.data.conversations)
    if not start.exists():
        write_start(start, seed=recipe.run.seed)
    ours = conversations.name == CONVERSATIONS and pathlib.Path(recipe.data.images) == conversations.parent / IMAGES
    if ours and not conversations.parent.exists():
        write_dataset(conversations.parent, PICTURES, recipe.run.seed)
