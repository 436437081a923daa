"""Rotary position embeddings (RoFormer, section 3.4)."""

import jax
import jax.numpy as jnp
import numpy as np

from pdrop_jax.config import TextConfig

Rope = tuple[jax.Array, jax.Array]  # cos and signed sin: (B, T, H) float32


def rope_tables(config: TextConfig, positions: jax.Array, local: bool = False) -> Rope:
    """cos and sin of the rotary angles at ``positions``, see ``rotate``; the sin of the first half is negated.

    Args:
      local: of the layers with a window, where these have a base of their own (``local_rope_theta``).
      positions: (B, T) int32. With M-RoPE (Qwen2-VL, section 2.1) also (B, T, 3): time, height and width, by which
        ``mrope_sections`` of the pairs turn, see ``turned_by``; three equal numbers are the same as one.
    """
    H = config.head_dim
    theta, scaling = config.rope_theta, config.rope_scaling
    if local:
        assert config.local_rope_theta
        theta, scaling = config.local_rope_theta, None
    inverse = 1.0 / theta ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if scaling is not None and scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        # Long wavelengths are stretched by the factor, short ones are kept, those between are blended (Llama 3.1).
        turns = scaling.original_max_length * inverse / (2 * jnp.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        inverse = blend * inverse + (1 - blend) * inverse / scaling.factor
    if positions.ndim == 3:
        angles = positions[..., turned_by(config)].astype(jnp.float32) * inverse
    else:
        angles = positions[..., None].astype(jnp.float32) * inverse
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def turned_by(config: TextConfig) -> np.ndarray:
    """Which of the three positions of M-RoPE turns each pair of a head, (H / 2,): 0 time, 1 height, 2 width.

    Example, ``mrope_sections`` (4, 2, 2)::

        in runs      0 0 0 0 1 1 2 2
        interleaved  0 1 2 0 1 2 0 0
    """
    assert config.mrope_sections
    if not config.mrope_interleaved:
        return np.repeat(np.arange(3), config.mrope_sections)
    by = np.zeros(config.head_dim // 2, int)
    for axis in (1, 2):
        by[axis : 3 * config.mrope_sections[axis] : 3] = axis
    return by


def rope_at(tables: Rope, positions: jax.Array) -> Rope:
    """The rows of ``tables`` (1, S, H) at ``positions`` (B, T) int32 < S.

    XLA computes a gather once, but fuses a sine into its consumers and recomputes it for every head and layer.
    """
    cos, sin = (table[0][positions] for table in tables)
    return cos, sin


@jax.named_scope("attention")
def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates ``x`` (B, T, N, H) by ``rope`` in float32; the halves of H are the pairs, as in Hugging Face's LLaMA."""
    cos, sin = (table[:, :, None] for table in rope)
    swapped = jax.lax.platform_dependent(x, tpu=_swap_by_product, default=_swap_halves)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def rotate_cached(k: jax.Array, rope: Rope) -> jax.Array:
    """``rotate`` for the keys of a cache, (B, K, C, H)."""
    return rotate(k.swapaxes(1, 2), rope).swapaxes(1, 2)


def _swap_halves(x: jax.Array) -> jax.Array:
    """The halves of the last dimension swapped, float32."""
    return jnp.roll(x.astype(jnp.float32), x.shape[-1] // 2, axis=-1)


def _swap_by_product(x: jax.Array) -> jax.Array:
    """Same, by a product with a permutation matrix, which is exact.

    A TPU's vector unit moves half a register at a time: slices and a concatenation take four times as long by its
    compiler's estimate. A GPU would run the product as a kernel of its own.
    """
    H = x.shape[-1]
    swap = jnp.roll(jnp.eye(H, dtype=x.dtype), H // 2, axis=1)
    return jnp.tensordot(x, swap, axes=1, precision="highest", preferred_element_type=jnp.float32)
