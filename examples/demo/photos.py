"""The photos in the grids: the part of Fashion-MNIST that is in ``pictures/``; its README has the details.

There is one sheet per garment and split, such as ``pictures/train/sandal.webp``, with 50 photos in a row.
``examples/make_demo_pictures.py`` made them.
"""

import dataclasses
import functools
import pathlib
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "test"]

FOLDER = pathlib.Path(__file__).parent / "pictures"
PIXELS = 28  # edge of a photo
ACROSS = 50  # photos in a row of a sheet


@dataclasses.dataclass(frozen=True)
class Garment:
    """One of the ten classes.

    Attributes:
      name: the answer to "What is in row 2, column 3?".
      noun: what "Is there a …" asks for.
      nouns: what "How many …" asks for.
    """

    name: str
    noun: str
    nouns: str

    @property
    def article(self) -> str:
        return "an" if self.noun[0] in "aeiou" else "a"


def _plain(name: str) -> Garment:
    return Garment(name, name, name + ("es" if name.endswith("s") else "s"))


# In the order of Fashion-MNIST's labels.
GARMENTS = (
    _plain("T-shirt"),
    Garment("trousers", "pair of trousers", "pairs of trousers"),
    _plain("pullover"),
    _plain("dress"),
    _plain("coat"),
    _plain("sandal"),
    _plain("shirt"),
    _plain("sneaker"),
    _plain("bag"),
    _plain("ankle boot"),
)


def sheet_path(split: Split, garment: Garment) -> pathlib.Path:
    return FOLDER / split / f"{garment.name.replace(' ', '_')}.webp"


@functools.cache
def photos(split: Split) -> np.ndarray:
    """(garments, photos per garment, 28, 28) uint8, light garments on black."""
    sheets = np.stack([np.asarray(Image.open(sheet_path(split, garment)).convert("L")) for garment in GARMENTS])
    G, height, width = sheets.shape
    cut = sheets.reshape(G, height // PIXELS, PIXELS, width // PIXELS, PIXELS)
    return np.ascontiguousarray(cut.swapaxes(2, 3)).reshape(G, -1, PIXELS, PIXELS)
