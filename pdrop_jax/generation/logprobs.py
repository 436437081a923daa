"""Log-probabilities of new tokens: recorded on the device, read on the host."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

TOP_LOGPROBS = 20  # most likely tokens that are recorded for each new token


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Logprobs:
    """Log-probabilities of the model itself: temperature 1, no limit. B rows, C = capacity, K most likely tokens.

    Attributes:
      chosen: (B, C) float32, of each new token.
      ids: (B, C, K) int32, the most likely tokens in its place, in descending order.
      top: (B, C, K) float32, theirs.
    """

    chosen: jax.Array
    ids: jax.Array
    top: jax.Array


def no_logprobs(rows: int, capacity: int, most: int) -> Logprobs | None:
    """Room for ``most`` tokens in each place; None for 0."""
    if not most:
        return None
    shape = (rows, capacity, most)
    return Logprobs(jnp.zeros(shape[:2]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


def record(old: Logprobs, logits: jax.Array, token: jax.Array, here: jax.Array) -> Logprobs:
    """``old`` with ``token`` (B,), sampled from ``logits`` (B, V), in the places where ``here`` (B, C) is true."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    top, ids = jax.lax.top_k(logprobs, old.ids.shape[2])
    return Logprobs(
        chosen=jnp.where(here, jnp.take_along_axis(logprobs, token[:, None], axis=1), old.chosen),
        ids=jnp.where(here[..., None], ids[:, None], old.ids),
        top=jnp.where(here[..., None], top[:, None], old.top),
    )


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one new token, by the model itself: at temperature 1 and before limits and constraints.

    Attributes:
      token_id: the token.
      logprob: its natural logarithm of probability.
      top: the most likely tokens in its place with theirs, in descending order.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


def read_logprobs(found: Any, slot: int, places: range, ids: Sequence[int], most: int) -> list[TokenLogprobs]:
    """Those of the tokens ``ids`` in ``places`` of a slot, with ``most`` others.

    Args:
      found: ``Logprobs`` on the host.
    """

    def top(place: int) -> list[tuple[int, float]]:
        return list(zip(found.ids[slot, place, :most].tolist(), found.top[slot, place, :most].tolist(), strict=True))

    return [TokenLogprobs(ids[place], float(found.chosen[slot, place]), top(place)) for place in places]
