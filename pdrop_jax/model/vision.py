"""Pictures to token embeddings: the vision tower up to the selected hidden state, then the projector."""

from typing import Any

import jax
import jax.numpy as jnp

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.attention import Implementation
from pdrop_jax.model.layers import (
    Params,
    Projector,
    Remat,
    VisionEmbedding,
    VisionLayer,
    bind,
    rematerialise,
    scan_layers,
)
from pdrop_jax.sharding import constrain


def vision_features(
    config: LlavaConfig,
    params: Params,
    pixels: jax.Array,
    implementation: Implementation = "auto",
    remat: Remat = "none",
) -> jax.Array:
    """(P, h, w, 3) normalised pixels -> (P, T, D_vision), the selected hidden state with CLIP's class token.

    The tower's last norm is no part of any hidden state, as in transformers.
    """
    x = bind(VisionEmbedding, config.vision, params=params["embed"])(constrain(pixels, "batch", None, None, None))
    if implementation == "splash":  # serves causal attention only: forcing it means the decoder
        implementation = "xla"

    def body(x: jax.Array, layer: Params, n: Any) -> tuple[jax.Array, None]:
        x = bind(VisionLayer, config.vision, params=layer)(x, implementation)
        return constrain(x, "batch", None, None), None

    return scan_layers(rematerialise(body, remat), x, params["layers"])[0]


def image_features(
    config: LlavaConfig,
    params: Params,
    crops: jax.Array,
    implementation: Implementation = "auto",
    remat: Remat = "none",
) -> jax.Array:
    """A row's crops as its pool of feature vectors.

    Args:
      crops: (B, C, h, w, 3) normalised pixels, C > 0.

    Returns:
      (B, C * image_tokens, D), dtype of the parameters; one vector more, the newline, where pictures are tiled.
    """
    B, C = crops.shape[:2]
    dtype = params["vision"]["embed"]["position"].dtype
    pixels = crops.reshape(B * C, *crops.shape[2:]).astype(dtype)
    x = vision_features(config, params["vision"], pixels, implementation, remat)
    x = x if config.keep_class_token else x[:, config.vision.class_tokens :]
    sizes = (config.vision.hidden_size, config.text.hidden_size, config.projector_layers)
    x = bind(Projector, *sizes, params=params["projector"])(x)
    x = x.reshape(B, C * config.image_tokens, -1)
    if config.tiling:
        newline = jnp.broadcast_to(params["newline"]["embedding"], (B, 1, x.shape[-1]))
        x = jnp.concatenate([x, newline], axis=1)
    return constrain(x, "batch", None, None)
