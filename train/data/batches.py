"""Plan the batches of an epoch: their rows and their static shapes."""

from typing import NamedTuple

import numpy as np

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.inputs.buckets import bucket_of, level_of
from pdrop_jax.train.data.ragged import Ragged

MEGA = 50  # batches per megabatch, within which rows are sorted by length


class Planned(NamedTuple):
    """A batch that has been planned but not loaded.

    Attributes:
      rows: (B,) int64, row numbers of the data set.
      bucket: the smallest bucket that fits every row.
      queries: Q, number of query rows, a power of two.
    """

    rows: np.ndarray
    bucket: Bucket
    queries: int


class Sizes(NamedTuple):
    """Sizes of N rows, as needed for planning.

    Attributes:
      text: (N,) integers, number of text tokens.
      queries: (N,) integers, number of query rows.
      images: N rows of integers: crops of image 0, tokens of image 0, crops of image 1, and so on.
    """

    text: np.ndarray
    queries: np.ndarray
    images: Ragged

    @property
    def pictures(self) -> np.ndarray:
        """(N,) int64, number of images of each row."""
        return np.diff(self.images.ends) // 2


def batches_of(
    rng: np.random.Generator, sizes: Sizes, batch_size: int, group_by_length: bool, rows: np.ndarray | None = None
) -> np.ndarray:
    """All full batches of an epoch, (batches, B) int64. Each of ``rows`` appears at most once; N % B are left out.

    Args:
      rows: (N,) int64, the rows of the epoch; None takes each row of the data set once.

    With ``group_by_length``, rows with and without images go to separate batches, except for the remainders of both,
    and the rows of a batch have similar lengths. To this end, the shuffled rows are sorted within megabatches of MEGA
    batches, by number of images rounded up to a power of two and then by text length, and the batches are shuffled
    again.
    """
    pictures = sizes.pictures
    places = np.ceil(np.log2(np.maximum(pictures, 1)))
    rows = rng.permutation(len(sizes.text) if rows is None else rows)
    if not group_by_length:
        return _full_batches(rows, batch_size)
    batches, remainders = [], []
    for has_image in (True, False):
        own = rows[(pictures[rows] > 0) == has_image]
        whole = len(own) // batch_size * batch_size
        remainders.append(own[whole:])
        for start in range(0, whole, MEGA * batch_size):
            mega = own[start : min(start + MEGA * batch_size, whole)]
            batches.append(_full_batches(mega[np.lexsort((sizes.text[mega], places[mega]))], batch_size))
    batches.append(_full_batches(np.concatenate(remainders), batch_size))
    return rng.permutation(np.concatenate(batches))


def _full_batches(rows: np.ndarray, batch_size: int) -> np.ndarray:
    return rows[: len(rows) // batch_size * batch_size].reshape(-1, batch_size)


def shapes_of(
    batches: np.ndarray, sizes: Sizes, text_slots: tuple[int, ...], config: LlavaConfig
) -> list[tuple[Bucket, int]]:
    """The bucket and the number of query rows of each batch.

    Args:
      batches: (batches, B) row numbers.
      text_slots: allowed text lengths, ascending; the last is at least the longest text.
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
    """(batches, 2), maximum crops and maximum tokens of image ``m`` (from 0) over the rows; 0 if no row has one."""
    has = sizes.pictures[batches] > m
    at = np.where(has, sizes.images.ends[batches] + 2 * m, 0)
    return np.stack([np.where(has, sizes.images.values[at + n], 0).max(1) for n in (0, 1)], axis=1)
