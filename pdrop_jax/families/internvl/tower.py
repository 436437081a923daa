"""From the patches of a crop to InternVL's tokens: squares of patches, a norm and LLaVA's projector."""

import jax

from pdrop_jax.config import LlavaConfig
from pdrop_jax.families.internvl.config import TiledVisionConfig
from pdrop_jax.model.layers import layer_norm, merged_squares, projector
from pdrop_jax.model.specs import Params

NORM_EPS = 1e-5  # of the projector, whatever the tower has


def tile_tokens(config: LlavaConfig, params: Params, x: jax.Array) -> jax.Array:
    """The tokens of crops, (P, tokens, D).

    Args:
      params: of the whole model.
      x: (P, T, D_vision), the output of the tower's last layer.
    """
    vision = config.vision
    assert isinstance(vision, TiledVisionConfig)
    x = merged_squares(x[:, vision.class_tokens :], vision.compressed_side, vision.merge_size)
    return projector(params["projector"], layer_norm(params["projector"]["norm"], x, NORM_EPS))
