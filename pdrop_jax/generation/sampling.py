"""How the next token is sampled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pdrop_jax.errors import UserError

COLDEST, HOTTEST = 1e-6, 1e6  # temperatures; logits divided by one that is smaller still may overflow
MOST_TOP_K = 2**31 - 1
SEEDS = 2**32  # a key takes 32 bits of a seed, so that larger ones would draw as smaller ones do


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sampling:
    """How a token is drawn. Scalars are traced: other values do not recompile.

    Attributes:
      temperature: () float32; not used when greedy.
      top_k: () int32, number of best tokens drawn from; 0 is all.
      top_p: () float32, the best tokens up to this probability mass are drawn from; 1 is all.
      greedy: static.
    """

    temperature: ArrayLike
    top_k: ArrayLike
    top_p: ArrayLike
    greedy: bool = dataclasses.field(metadata={"static": True})


def make_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int = 0) -> Sampling:
    """Raises UserError for values that make no sense, or that the types of ``Sampling`` and of a key cannot hold."""
    warm = temperature == 0 or COLDEST <= temperature <= HOTTEST
    if max_new_tokens < 1 or not warm or not 0 <= top_k <= MOST_TOP_K or not 0 < top_p <= 1:
        raise UserError(
            f"need max_new_tokens >= 1, a temperature of 0 or in {COLDEST:g}..{HOTTEST:g}, top_k in 0..{MOST_TOP_K} "
            f"and 0 < top_p <= 1, got {max_new_tokens}, {temperature}, {top_k}, {top_p}"
        )
    if not 0 <= seed < SEEDS:
        raise UserError(f"the seed must lie in 0..{SEEDS - 1}, got {seed}")
    return Sampling(np.float32(temperature or 1), np.int32(top_k), np.float32(top_p), temperature == 0)


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws (B,) int32 from logits (B, V): temperature, then top-k, then top-p, as transformers orders them."""
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    best, ids = jax.lax.top_k(logits / sampling.temperature, logits.shape[-1])
    rank = jnp.arange(best.shape[-1])
    best = jnp.where((sampling.top_k == 0) | (rank < sampling.top_k), best, -jnp.inf)
    probs = jax.nn.softmax(best, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    best = jnp.where((mass_before < sampling.top_p) | (rank == 0), best, -jnp.inf)
    drawn = jax.random.categorical(key, best, axis=-1)
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)
