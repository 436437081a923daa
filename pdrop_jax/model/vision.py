"""Pictures to token embeddings: the vision tower up to the selected hidden state, then the projector."""

from typing import Any

import jax

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.attention import Implementation
from pdrop_jax.model.layers import Params, Projector, VisionEmbedding, VisionLayer, bind, scan_layers
from pdrop_jax.sharding import constrain


def vision_features(
    config: LlavaConfig, params: Params, pixels: jax.Array, implementation: Implementation = "auto"
) -> jax.Array:
    """(P, h, w, 3) normalised pixels -> (P, T, D_vision), the selected hidden state with CLIP's class token.

    The tower's last norm is no part of any hidden state, as in transformers.
    """
    x = bind(VisionEmbedding, config.vision, params=params["embed"])(pixels)
    if implementation == "splash":  # serves causal attention only: forcing it means the decoder
        implementation = "xla"

    def body(x: jax.Array, layer: Params, n: Any) -> tuple[jax.Array, None]:
        return bind(VisionLayer, config.vision, params=layer)(x, implementation), None

    return scan_layers(body, x, params["layers"])[0]


def image_features(
    config: LlavaConfig, params: Params, crops: jax.Array, implementation: Implementation = "auto"
) -> jax.Array:
    """A row's crops as its pool of feature vectors.

    Args:
      crops: (B, C, h, w, 3) normalised pixels, C > 0.

    Returns:
      (B, C * image_tokens, D), dtype of the parameters.
    """
    B, C = crops.shape[:2]
    dtype = params["vision"]["embed"]["position"].dtype
    pixels = crops.reshape(B * C, *crops.shape[2:]).astype(dtype)
    x = vision_features(config, params["vision"], pixels, implementation)
    x = x if config.keep_class_token else x[:, config.vision.class_tokens :]
    sizes = (config.vision.hidden_size, config.text.hidden_size, config.projector_layers)
    x = bind(Projector, *sizes, params=params["projector"])(x)
    return constrain(x.reshape(B, C * config.image_tokens, -1), "batch", None, None)
