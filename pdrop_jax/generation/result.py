"""Results of generation: texts, measurements, and what each drop kept of each image."""

import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pdrop_jax.batch import Batch
from pdrop_jax.model.drop import DropRecord


def kept_tokens(batch: Batch, drops: Sequence[DropRecord]) -> list[list[list[list[int]]]]:
    """[row][stage boundary][image] -> indices of the kept tokens within the image."""

    def stayed(row: int, at: DropRecord, image: int, slots: np.ndarray) -> list[int]:
        # Text may stand between the tokens of a video.
        return np.searchsorted(slots, at.index[row][at.keep[row] & (at.image_id[row] == image)]).tolist()

    return _by_image(batch, drops, stayed)


def token_scores(batch: Batch, drops: Sequence[DropRecord]) -> list[list[list[np.ndarray]]]:
    """[row][stage boundary][image] -> (n,) float32 scores of the image's tokens, NaN for tokens dropped earlier."""

    def scored(row: int, at: DropRecord, image: int, slots: np.ndarray) -> np.ndarray:
        scores, here = np.full(len(slots), np.nan, np.float32), at.image_id[row] == image
        scores[np.searchsorted(slots, at.index[row][here])] = at.scores[row][here]
        return scores

    return _by_image(batch, drops, scored)


def _by_image(batch: Batch, drops: Sequence[DropRecord], found: Callable[..., Any]) -> list[list[list[Any]]]:
    """[row][stage boundary][image] of ``found(row, drop, image, slots of the image's tokens)``."""
    rows = []
    for row, image_id in enumerate(np.asarray(batch.image_id)):
        slots = {int(m): np.flatnonzero(image_id == m) for m in np.unique(image_id) if m}
        rows.append([[found(row, at, m, where) for m, where in slots.items()] for at in drops])
    return rows


@dataclasses.dataclass(frozen=True)
class Generation:
    """Answers to a batch, with measurements.

    Attributes:
      texts: the answer of each row.
      token_ids: new tokens of each row, without the stop token.
      stage_lengths: [row][stage], number of valid prompt tokens that the stage saw.
      image_tokens: [row][image], number of tokens before the first drop.
      kept: [row][stage boundary][image], indices of the kept image tokens, counted within the image.
      scores: [row][stage boundary][image], float32 score of each of the image's tokens; NaN for tokens dropped earlier.
      first_logits: (B, V) float32 on the device, the logits that the first new token is sampled from.
      compile_seconds: 0 if the shapes were compiled before.
      prefill_seconds: time to the first new token.
      decode_seconds: time of all tokens after the first.
      cache_bytes: size of the KV caches of the whole batch.
    """

    texts: list[str]
    token_ids: list[list[int]]
    stage_lengths: list[list[int]]
    image_tokens: list[list[int]]
    kept: list[list[list[list[int]]]]
    scores: list[list[list[np.ndarray]]]
    first_logits: jax.Array
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int

    def __repr__(self) -> str:
        texts = textwrap.shorten(repr(self.texts), 200, placeholder=" …")
        seconds = f"prefill {self.prefill_seconds:.2f} s, decode {self.decode_seconds:.2f} s"
        return f"Generation(texts={texts}, {sum(map(len, self.token_ids))} new tokens, {seconds})"


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one question of a conversation, with measurements.

    Attributes:
      text: the answer, without the stop token.
      token_ids: tokens of the answer, without the stop token.
      stage_lengths: [stage], number of tokens of the conversation before this answer that the stage holds.
      kept: [stage boundary][image of the conversation], indices of the kept image tokens, counted within the image;
        empty while there is no image, and for a stream.
      cached: number of tokens found in the first stage's cache; only the others were run.
      compile_seconds: 0 if the shapes were compiled before.
      prefill_seconds: time to the first new token.
      decode_seconds: time of all tokens after the first.
      cache_bytes: device memory that the conversation holds.
    """

    text: str
    token_ids: list[int]
    stage_lengths: list[int]
    kept: list[list[list[int]]]
    cached: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
