"""Sampling the next token on the device."""

import dataclasses

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
      temperature: () float32; unused when greedy.
      top_k: () int32; 0 is no limit.
      top_p: () float32; 1 is no limit.
      greedy: static.
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


def sample(logits: jax.Array, key: jax.Array, sampler: TokenSampler) -> jax.Array:
    """Samples (B,) int32 from logits (B, V): temperature, then top-k, then top-p, in the order of transformers."""
    if sampler.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    best, ids = jax.lax.top_k(logits / sampler.temperature, logits.shape[-1])
    rank = jnp.arange(best.shape[-1])
    best = jnp.where((sampler.top_k == 0) | (rank < sampler.top_k), best, -jnp.inf)
    probs = jax.nn.softmax(best, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    best = jnp.where((mass_before < sampler.top_p) | (rank == 0), best, -jnp.inf)
    drawn = jax.random.categorical(key, best, axis=-1)
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)
