"""Which rows make up each batch of an epoch, and of what shape the batch is."""

from typing import NamedTuple

import numpy as np

from pdrop_jax.config import LlavaConfig
from pdrop_jax.inputs.anyres import level_of
from pdrop_jax.schedule import Bucket

MEGA = 50  # batches whose rows are sorted by length together


class Planned(NamedTuple):
    """A batch before it is read.

    Attributes:
      rows: (B,) int64, rows of the data set.
      bucket: its shape, the smallest that holds every row.
      queries: Q, a power of two.
    """

    rows: np.ndarray
    bucket: Bucket
    queries: int


class Sizes(NamedTuple):
    """What planning has to know of each row, all (N,) integers.

    Attributes:
      text: its text tokens.
      crops: of its picture; 0 without one.
      tokens: of its picture; 0 without one.
      queries: its query rows.
    """

    text: np.ndarray
    crops: np.ndarray
    tokens: np.ndarray
    queries: np.ndarray


def batches_of(rng: np.random.Generator, sizes: Sizes, batch_size: int, group: bool) -> np.ndarray:
    """All whole batches of an epoch, (batches, B) int64; each row at most once, len(rows) % B of them not at all.

    Grouped, rows with and without a picture come in separate batches, but for what is left over of both, and the rows
    of a batch are of similar length: the shuffled rows are sorted within runs of MEGA batches, the batches shuffled
    again.
    """
    rows = rng.permutation(len(sizes.text))
    if not group:
        return _cut(rows, batch_size)
    batches, left_over = [], []
    for has_image in (True, False):
        own = rows[(sizes.crops[rows] > 0) == has_image]
        whole = len(own) // batch_size * batch_size
        left_over.append(own[whole:])
        for start in range(0, whole, MEGA * batch_size):
            mega = own[start : min(start + MEGA * batch_size, whole)]
            batches.append(_cut(mega[np.argsort(sizes.text[mega], kind="stable")], batch_size))
    batches.append(_cut(np.concatenate(left_over), batch_size))
    return rng.permutation(np.concatenate(batches))


def _cut(rows: np.ndarray, batch_size: int) -> np.ndarray:
    return rows[: len(rows) // batch_size * batch_size].reshape(-1, batch_size)


def shapes_of(
    batches: np.ndarray, sizes: Sizes, text_slots: tuple[int, ...], config: LlavaConfig
) -> list[tuple[Bucket, int]]:
    """The bucket and the number of query rows of each batch.

    Args:
      batches: (batches, B).
      text_slots: ascending; the last is at least the longest text.
    """
    text = np.searchsorted(text_slots, sizes.text[batches].max(1))
    crops, tokens, queries = (x[batches].max(1).tolist() for x in (sizes.crops, sizes.tokens, sizes.queries))
    shapes = []
    for t, c, n, q in zip(text, crops, tokens, queries, strict=True):
        crops_slots, token_slots = level_of(c, n, config)
        bucket = Bucket(text_slots[t], (token_slots,), crops_slots) if c else Bucket(text_slots[t])
        shapes.append((bucket, 1 << (q - 1).bit_length()))
    return shapes
