"""From SigLIP's last hidden state to Gemma 3's tokens."""

import jax

from pdrop_jax.config import LlavaConfig
from pdrop_jax.families.gemma3.config import GemmaVisionConfig
from pdrop_jax.model.layers import layer_norm, linear, rms_norm
from pdrop_jax.model.specs import Params


def soft_tokens(config: LlavaConfig, params: Params, x: jax.Array) -> jax.Array:
    """The tower's last norm, averages over squares of patches, and the projector: a norm and a matrix.

    Args:
      params: of the whole model.
      x: (P, T, D_vision), the output of the tower's last layer.

    Returns:
      (P, tokens_a_side**2, D).
    """
    vision = config.vision
    assert isinstance(vision, GemmaVisionConfig)
    P, _, D = x.shape
    side = vision.tokens_a_side
    stride = vision.patches_a_side // side
    x = layer_norm(params["vision"]["norm"], x, vision.norm_eps)
    x = x.reshape(P, side, stride, side, stride, D).mean((2, 4)).reshape(P, side**2, D)
    x = rms_norm(params["projector"]["norm"], x, vision.norm_eps, plus_one=True)
    return linear(params["projector"]["linear_0"], x)
