"""Grids of garments, and questions that can only be answered by looking at the right cell.

A grid is a 4x4 picture of Fashion-MNIST photos. No question of a conversation is about a cell or a garment that an
earlier answer has revealed. A conversation has few questions: when it asked for all 16 cells, a model learned the set
of garments in the picture and crossed off those already named, but never learned to look.

In some training pictures a row, a column or the whole picture shows one kind of garment. From these a model learns
first to tell garments apart, then to find a line, then a cell; when every cell was drawn independently, it learned
nothing for hours. Test pictures always have independent cells.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from examples.demo.photos import GARMENTS, PIXELS, Split, photos
from pdrop_jax.errors import UserError

SIDE = 4  # cells per row
TURNS = 8  # questions per picture
SHIFT = 2  # pixels
# Shapes (rows, columns) of independently drawn cells, which the others repeat, and the share of training pictures.
PATTERNS = {(SIDE, SIDE): 0.4, (SIDE, 1): 0.2, (1, SIDE): 0.2, (1, 1): 0.2}

Exchange = tuple[str, str]  # question, answer


@dataclasses.dataclass(frozen=True)
class Grid:
    """A picture and what is in it.

    Attributes:
      labels: (4, 4) int, indices into ``GARMENTS``.
      picture: (112, 112) uint8.
    """

    labels: np.ndarray
    picture: np.ndarray


@dataclasses.dataclass(frozen=True)
class QuestionAnswer:
    kind: str  # a key of KINDS
    question: str
    answer: str


class Told:
    """What the answers of a conversation have revealed so far: cells, garments, and whether a whole line."""

    def __init__(self) -> None:
        self.places = np.zeros((SIDE, SIDE), bool)
        self.garments: set[int] = set()
        self.line = False


def check_drawing(pictures: int, seed: int) -> None:
    """Raises UserError if the number of pictures or the seed is out of range."""
    for name, value, least, most in (("pictures", pictures, 1, 10**7), ("seed", seed, 0, 2**32 - 1)):
        if not least <= value <= most:
            raise UserError(f"{name} must be in {least}..{most}, got {value}")


def draw_grid(split: Split, seed: int, number: int) -> Grid:
    """The ``number``-th grid of ``seed``. Training photos are randomly flipped, shifted and arranged."""
    rng = np.random.default_rng([seed, number])
    shapes, shares = list(PATTERNS), list(PATTERNS.values())
    shape = shapes[rng.choice(len(shapes), p=shares)] if split == "train" else (SIDE, SIDE)
    labels = np.broadcast_to(rng.integers(len(GARMENTS), size=shape), (SIDE, SIDE))
    pool = photos(split)
    cells = pool[labels, rng.integers(pool.shape[1], size=(SIDE, SIDE))]
    if split == "train":
        cells = augment(cells, rng)
    return Grid(labels, np.ascontiguousarray(cells.swapaxes(1, 2)).reshape(SIDE * PIXELS, SIDE * PIXELS))


def augment(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photos (4, 4, 28, 28), each flipped or not and shifted by up to SHIFT pixels, filled with black."""
    padded = np.pad(cells, [(0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)])
    moves = rng.integers(2 * SHIFT + 1, size=(SIDE, SIDE, 2))
    flips = rng.integers(2, size=(SIDE, SIDE))
    out = np.empty_like(cells)
    for place in np.ndindex(SIDE, SIDE):
        top, left = moves[place]
        cell = padded[place][top : top + PIXELS, left : left + PIXELS]
        out[place] = cell[:, ::-1] if flips[place] else cell
    return out


def ask_place(labels: np.ndarray, rng: np.random.Generator, told: Told) -> Exchange | None:
    """What is in row 2, column 3? - sneaker"""
    row, column = (int(i) for i in rng.integers(SIDE, size=2))
    if told.places[row, column]:
        return None
    told.places[row, column] = True
    return f"What is in row {row + 1}, column {column + 1}?", GARMENTS[labels[row, column]].name


def ask_line(labels: np.ndarray, rng: np.random.Generator, told: Told) -> Exchange | None:
    """What is in row 2? - bag, coat, bag, sneaker. Once per conversation; more would make guessing easier."""
    line, by_row = int(rng.integers(SIDE)), bool(rng.integers(2))
    index: tuple = (line,) if by_row else (slice(None), line)
    if told.line or told.places[index].any():
        return None
    told.places[index] = told.line = True
    names = ", ".join(GARMENTS[label].name for label in labels[index])
    return f"What is in {'row' if by_row else 'column'} {line + 1}?", names


def ask_count(labels: np.ndarray, rng: np.random.Generator, told: Told) -> Exchange | None:
    """How many sneakers are there? - 2"""
    label = int(rng.integers(len(GARMENTS)))
    if not _new_garment(label, told):
        return None
    return f"How many {GARMENTS[label].nouns} are there?", str(int((labels == label).sum()))


def ask_presence(labels: np.ndarray, rng: np.random.Generator, told: Told) -> Exchange | None:
    """Is there a bag in row 1? - yes. Both answers are equally frequent."""
    row, present = int(rng.integers(SIDE)), bool(rng.integers(2))
    possible = [g for g in range(len(GARMENTS)) if (g in labels[row]) == present]
    label = int(rng.choice(possible))
    if told.places[row].any() or not _new_garment(label, told):
        return None
    garment = GARMENTS[label]
    return f"Is there {garment.article} {garment.noun} in row {row + 1}?", "yes" if present else "no"


def ask_where(labels: np.ndarray, rng: np.random.Generator, told: Told) -> Exchange | None:
    """In which row is the dress? - 2. Asked about a garment that occurs exactly once."""
    single = np.flatnonzero(np.bincount(labels.ravel()) == 1)
    if not len(single):
        return None
    label = int(rng.choice(single))
    row, column = (int(i[0]) for i in np.nonzero(labels == label))
    if told.places[row, column] or not _new_garment(label, told):
        return None
    return f"In which row is the {GARMENTS[label].noun}?", str(row + 1)


def _new_garment(label: int, told: Told) -> bool:
    new = label not in told.garments
    told.garments.add(label)
    return new


Ask = Callable[[np.ndarray, np.random.Generator, Told], Exchange | None]

# Kinds of question, and their share in training.
KINDS: dict[str, tuple[Ask, float]] = {
    "place": (ask_place, 0.55),
    "line": (ask_line, 0.15),
    "count": (ask_count, 0.1),
    "presence": (ask_presence, 0.1),
    "where": (ask_where, 0.1),
}


def converse(labels: np.ndarray, rng: np.random.Generator, turns: int = TURNS) -> list[QuestionAnswer]:
    """``turns`` questions about a grid, with their answers."""
    names, shares = list(KINDS), [share for _, share in KINDS.values()]
    told, found = Told(), list[QuestionAnswer]()
    while len(found) < turns:
        kind = names[rng.choice(len(names), p=shares)]
        exchange = KINDS[kind][0](labels, rng, told)
        if exchange:
            found.append(QuestionAnswer(kind, *exchange))
    return found


def first_question(kind: str, labels: np.ndarray, rng: np.random.Generator) -> QuestionAnswer | None:
    """A question of ``kind`` at the start of a conversation; None if this grid allows none."""
    exchange = KINDS[kind][0](labels, rng, Told())
    return QuestionAnswer(kind, *exchange) if exchange else None
