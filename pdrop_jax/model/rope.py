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
        ``mrope_sections`` of the pairs turn; three equal numbers are the same as one.
    """
    H = config.head_dim
    theta, scaling = config.rope_theta, config.rope_scaling
    if local:
        assert config.local_rope_theta
        theta, scaling = config.local_rope_theta, None
    inverse = 1.0 / theta ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if scaling is not None and scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling is not None:
        # Long wavelengths are stretched by the factor, short ones are kept, those between are blended (Llama 3.1).
        turns = scaling.original_max_length * inverse / (2 * jnp.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        inverse = blend * inverse + (1 - blend) * inverse / scaling.factor
    if positions.ndim == 3:
        assert config.mrope_sections
        turned_by = np.repeat(np.arange(3), config.mrope_sections)  # (H / 2,)
        angles = positions[..., turned_by].astype(jnp.float32) * inverse
    else:
        angles = positions[..., None].astype(jnp.float32) * inverse
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rope_at(tables: Rope, positions: jax.Array) -> Rope:
    """The rows of ``tables`` (1, S, H) at ``positions`` (B, T) int32 < S.

    XLA computes a gather once, but fuses a sine into its consumers and recomputes it for every head and layer.
    """
    cos, sin = (table[0][positions] for table in tables)
    return cos, sin


@jax.named_scope("attention")
def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates ``x`` (B, T, N, H) by ``rope`` in float32; the halves of H are the pairs, as in Hugging Face's LLaMA.

    The halves are swapped by a product with a permutation matrix, which is exact. A TPU's vector unit moves half a
    register at a time: slices and a concatenation take four times as long by its compiler's estimate.
    """
    cos, sin = (table[:, :, None] for table in rope)
    H = x.shape[-1]
    swap = jnp.roll(jnp.eye(H, dtype=x.dtype), H // 2, axis=1)
    swapped = jnp.tensordot(x, swap, axes=1, precision="highest", preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
