"""From the patches of a crop to InternVL's tokens: squares of patches, a norm and LLaVA's projector."""

import jax

from pdrop_jax.config import LlavaConfig
from pdrop_jax.families.internvl.config import TiledVisionConfig
from pdrop_jax.model.layers import layer_norm, projector
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
    x = merged_squares(x[:, vision.class_tokens :], vision.patches_a_side, vision.merge_size)
    return projector(params["projector"], layer_norm(params["projector"]["norm"], x, NORM_EPS))


def merged_squares(x: jax.Array, side: int, merge: int) -> jax.Array:
    """(P, side**2, D) patches -> (P, (side // merge)**2, merge**2 * D): the patches of a square one after another.

    Example, ``side`` 4 and ``merge`` 2, a square in each pair of brackets::

        0  1  2  3
        4  5  6  7      [0 1 4 5] [2 3 6 7] [8 9 12 13] [10 11 14 15]
        …
    """
    P, _, D = x.shape
    squares = side // merge
    x = x.reshape(P, squares, merge, squares, merge, D).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(P, squares**2, merge**2 * D)
