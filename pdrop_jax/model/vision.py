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
    layer_of,
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
    class_attention: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """(P, h, w, 3) normalised pixels -> (P, T, D_vision), the selected hidden state with CLIP's class token.

    The tower's last norm is no part of any hidden state, as in transformers.

    Args:
      class_attention: also return (P, T) float32, what the class token attends to in the last layer that runs, mean
        over heads; None without it.
    """
    x = bind(VisionEmbedding, config.vision, params=params["embed"])(constrain(pixels, "batch", None, None, None))
    if implementation == "splash":  # serves causal attention only: forcing it means the decoder
        implementation = "xla"

    def body(carry: Any, layer: Params, n: Any) -> tuple[Any, None]:
        x = carry[0]
        out = bind(VisionLayer, config.vision, params=layer)(x, implementation)
        return (constrain(out, "batch", None, None), x if class_attention else None), None

    start = (x, x if class_attention else None)
    (x, last_input), _ = scan_layers(rematerialise(body, remat), start, params["layers"])
    if last_input is None:
        return x, None
    last = bind(VisionLayer, config.vision, params=layer_of(params["layers"], -1))
    return x, class_attention_of(last, last_input)


def class_attention_of(layer: VisionLayer, x: jax.Array) -> jax.Array:
    """A layer's input (P, T, D_vision) -> (P, T) float32, attention of its first token, mean over heads."""
    h = layer.attention_norm(jax.lax.stop_gradient(x))
    q, k = layer.attention.q(h[:, :1])[:, 0], layer.attention.k(h)
    logits = jnp.einsum("PNH,PTNH->PNT", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    return jax.nn.softmax(logits, axis=-1).mean(1)


def image_features(
    config: LlavaConfig,
    params: Params,
    crops: jax.Array,
    implementation: Implementation = "auto",
    remat: Remat = "none",
    class_attention: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """A row's crops as its pool of feature vectors.

    Args:
      crops: (B, C, h, w, 3) normalised pixels, C > 0.

    Returns:
      (B, C * (image_tokens + frame_tokens), D), dtype of the parameters: the features of all crops, then those that
      they have as frames of a video; and one vector more, the newline, where pictures are tiled. With
      ``class_attention`` as many numbers (B, ..., 1) float32, see ``vision_features``; 0 for the newline.
    """
    B, C = crops.shape[:2]
    dtype = params["vision"]["embed"]["position"].dtype
    pixels = crops.reshape(B * C, *crops.shape[2:]).astype(dtype)
    x, attention = vision_features(config, params["vision"], pixels, implementation, remat, class_attention)
    D, side = config.text.hidden_size, config.vision.patches_a_side

    def pool(x: jax.Array) -> jax.Array:
        """Of all tokens (B * C, T, N) of the tower those that a picture has, then those that a frame has."""
        x = x if config.keep_class_token else x[:, config.vision.class_tokens :]
        return jnp.concatenate([x, averaged(x, side, config.frame_stride)], axis=1) if config.frame_stride else x

    def by_row(x: jax.Array) -> jax.Array:
        parts = jnp.split(x, [config.image_tokens], axis=1)
        return jnp.concatenate([part.reshape(B, C * part.shape[1], part.shape[2]) for part in parts], axis=1)

    project = bind(Projector, config.vision.hidden_size, D, config.projector_layers, params=params["projector"])
    x = by_row(project(pool(x)))
    attention = None if attention is None else by_row(pool(attention[..., None]))
    if config.tiling:
        newline = jnp.broadcast_to(params["newline"]["embedding"], (B, 1, D))
        x = jnp.concatenate([x, newline], axis=1)
        attention = None if attention is None else jnp.pad(attention, [(0, 0), (0, 1), (0, 0)])
    return constrain(x, "batch", None, None), attention


def averaged(x: jax.Array, side: int, stride: int) -> jax.Array:
    """Means (P, (side // stride)**2, D) over squares of ``stride`` a side of the last ``side``**2 features of each row.

    What is left over at the right and at the bottom is no part of any, as in torch's AvgPool2d.
    """
    P, D, squares = x.shape[0], x.shape[-1], side // stride
    x = x[:, -(side**2) :].reshape(P, side, side, D)[:, : squares * stride, : squares * stride]
    return x.reshape(P, squares, stride, squares, stride, D).mean((2, 4)).reshape(P, squares**2, D)
