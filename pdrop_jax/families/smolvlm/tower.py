"""From the patches of a crop to SmolVLM's tokens: the tower's last norm, squares of patches, and a matrix."""

import jax

from pdrop_jax.config import LlavaConfig
from pdrop_jax.families.internvl.config import TiledVisionConfig
from pdrop_jax.model.layers import layer_norm, merged_squares, projector
from pdrop_jax.model.specs import Params


def tile_tokens(config: LlavaConfig, params: Params, x: jax.Array) -> jax.Array:
    """(P, T, D_vision), the output of the tower's last layer -> the tokens of crops (P, tokens, D)."""
    vision = config.vision
    assert isinstance(vision, TiledVisionConfig)
    x = layer_norm(params["vision"]["norm"], x, vision.norm_eps)
    return projector(params["projector"], merged_squares(x, vision.compressed_side, vision.merge_size))
