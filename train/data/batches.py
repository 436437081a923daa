"""Which rows make up each batch of an epoch, and of what shape the batch is."""

from typing import NamedTuple

import numpy as np

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.inputs.buckets import bucket_of, level_of
from pdrop_jax.train.data.ragged import Ragged

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
    """What planning has to know of each of N rows.

    Attributes:
      text: (N,) integers, its text tokens.
      queries: (N,) integers, its query rows.
      images: N rows of integers, crops and tokens of each of its pictures in turn.
    """

    text: np.ndarray
    queries: np.ndarray
    images: Ragged

    @property
    def pictures(self) -> np.ndarray:
        """(N,) int64, how many pictures a row has."""
        return np.diff(self.images.ends) // 2


def batches_of(rng: np.random.Generator, sizes: Sizes, batch_size: int, group_by_length: bool) -> np.ndarray:
    """All whole batches of an epoch, (batches, B) int64; each row at most once, len(rows) % B of them not at all.

    Grouped, rows with and without a picture come in separate batches, but for what is left over of both, and the rows
    of a batch are of similar length: the shuffled rows are sorted within runs of MEGA batches, by the places that their
    pictures take and then by their text, and the batches are shuffled again.
    """
    pictures = sizes.pictures
    places = np.ceil(np.log2(np.maximum(pictures, 1)))
    rows = rng.permutation(len(sizes.text))
    if not group_by_length:
        return _cut(rows, batch_size)
    batches, left_over = [], []
    for has_image in (True, False):
        own = rows[(pictures[rows] > 0) == has_image]
        whole = len(own) // batch_size * batch_size
        left_over.append(own[whole:])
        for start in range(0, whole, MEGA * batch_size):
            mega = own[start : min(start + MEGA * batch_size, whole)]
            batches.append(_cut(mega[np.lexsort((sizes.text[mega], places[mega]))], batch_size))
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
    queries = sizes.queries[batches].max(1).tolist()
    most = sizes.pictures[batches].max(1)
    largest = [_largest(m, batches, sizes) for m in range(most.max(initial=0))]
    shapes = []
    for b, (t, q) in enumerate(zip(text, queries, strict=True)):
        images = [level_of(int(crops), int(tokens), config) for crops, tokens in (x[b] for x in largest[: most[b]])]
        shapes.append((bucket_of(text_slots[t], images, config), 1 << (q - 1).bit_length()))
    return shapes


def _largest(m: int, batches: np.ndarray, sizes: Sizes) -> np.ndarray:
    """(batches, 2), the most crops and the most tokens of the rows' pictures number ``m`` (from 0); 0 without any."""
    has = sizes.pictures[batches] > m
    at = np.where(has, sizes.images.ends[batches] + 2 * m, 0)
    return np.stack([np.where(has, sizes.images.values[at + n], 0).max(1) for n in (0, 1)], axis=1)
