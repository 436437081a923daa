"""Sampling the next token on the device."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pdrop_jax.generation.sampling import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TokenSampler:
    """The part of ``Sampling`` that jitted functions take. Its scalars are traced: other values do not recompile.

    Attributes:
      temperature: () float32; unused when greedy. Or (B,), one for each row, where 0 is a greedy row.
      top_k: () or (B,) int32; 0 is no limit.
      top_p: () or (B,) float32; 1 is no limit.
      greedy: static; all rows are.
    """

    temperature: ArrayLike
    top_k: ArrayLike
    top_p: ArrayLike
    greedy: bool = dataclasses.field(metadata={"static": True})


def token_sampler(sampling: Sampling) -> TokenSampler:
    return TokenSampler(
        temperature=np.float32(sampling.temperature or 1),
        top_k=np.int32(sampling.top_k),
        top_p=np.float32(sampling.top_p),
        greedy=sampling.greedy,
    )


def rows_sampler(samplings: Sequence[Sampling]) -> TokenSampler:
    """A sampler with settings of its own for each row, greedy rows among them: one program for any mixture."""
    return TokenSampler(
        temperature=np.array([sampling.temperature for sampling in samplings], np.float32),
        top_k=np.array([sampling.top_k for sampling in samplings], np.int32),
        top_p=np.array([sampling.top_p for sampling in samplings], np.float32),
        greedy=False,
    )


def sample(logits: jax.Array, key: jax.Array, sampler: TokenSampler) -> jax.Array:
    """Samples (B,) int32 from logits (B, V): temperature, then top-k, then top-p, in the order of transformers.

    Args:
      key: one for the batch; or (B,), with the sampler of ``rows_sampler``: a row then draws as it would alone in a
        batch with its key.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampler.greedy:
        return best
    if key.ndim == 0:
        candidates, ids = _candidates(logits, sampler.temperature, sampler.top_k, sampler.top_p)
        return _pick(ids, jax.random.categorical(key, candidates, axis=-1))
    hot = jnp.asarray(sampler.temperature) > 0

    def draw() -> jax.Array:
        settings = (jnp.where(hot, sampler.temperature, 1.0), jnp.asarray(sampler.top_k), jnp.asarray(sampler.top_p))
        candidates, ids = _candidates(logits, *(x[:, None] for x in settings))
        return jnp.where(hot, _pick(ids, jax.vmap(jax.random.categorical)(key, candidates)), best)

    return jax.lax.cond(hot.any(), draw, lambda: best)  # sorting a vocabulary takes time


def only(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """``logits`` (B, V) with -inf for the tokens that are not allowed.

    Args:
      allowed: (B, ceil(V / 32)) int32, bit ``i % 32`` of word ``i // 32`` is token i's.
    """
    token = jnp.arange(logits.shape[-1])
    return jnp.where(allowed[:, token // 32] >> (token % 32) & 1, logits, -jnp.inf)


def _candidates(
    logits: jax.Array, temperature: ArrayLike, top_k: ArrayLike, top_p: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Logits (B, V) in descending order, -inf for those that are not sampled, and their ids; settings () or (B, 1)."""
    best, ids = jax.lax.top_k(logits / temperature, logits.shape[-1])
    rank = jnp.arange(best.shape[-1])
    best = jnp.where((jnp.asarray(top_k) == 0) | (rank < top_k), best, -jnp.inf)
    probs = jax.nn.softmax(best, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    return jnp.where((mass_before < top_p) | (rank == 0), best, -jnp.inf), ids


def _pick(ids: jax.Array, drawn: jax.Array) -> jax.Array:
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)
