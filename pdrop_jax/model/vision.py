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
      (B, C * (image_tokens + frame_tokens), D), dtype of the parameters: the features of all crops, then those that
      they have as frames of a video; and one vector more, the newline, where pictures are tiled.
    """
    B, C = crops.shape[:2]
    dtype = params["vision"]["embed"]["position"].dtype
    pixels = crops.reshape(B * C, *crops.shape[2:]).astype(dtype)
    x = vision_features(config, params["vision"], pixels, implementation, remat)
    x = x if config.keep_class_token else x[:, config.vision.class_tokens :]
    if config.frame_stride:
        x = jnp.concatenate([x, averaged(x, config.vision.patches_a_side, config.frame_stride)], axis=1)
    D = config.text.hidden_size
    x = bind(Projector, config.vision.hidden_size, D, config.projector_layers, params=params["projector"])(x)
    pictures, frames = jnp.split(x, [config.image_tokens], axis=1)
    x = jnp.concatenate([part.reshape(B, C * part.shape[1], D) for part in (pictures, frames)], axis=1)
    if config.tiling:
        newline = jnp.broadcast_to(params["newline"]["embedding"], (B, 1, x.shape[-1]))
        x = jnp.concatenate([x, newline], axis=1)
    return constrain(x, "batch", None, None)


def averaged(x: jax.Array, side: int, stride: int) -> jax.Array:
    """Means (P, (side // stride)**2, D) over squares of ``stride`` a side of the last ``side``**2 features of each row.

    What is left over at the right and at the bottom is no part of any, as in torch's AvgPool2d.
    """
    P, D, squares = x.shape[0], x.shape[-1], side // stride
    x = x[:, -(side**2) :].reshape(P, side, side, D)[:, : squares * stride, : squares * stride]
    return x.reshape(P, squares, stride, squares, stride, D).mean((2, 4)).reshape(P, squares**2, D)
