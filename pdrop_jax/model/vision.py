"""Pictures to token embeddings: the vision tower up to the selected hidden state, then the projector."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pdrop_jax.batch import Batch
from pdrop_jax.config import Implementation, LlavaConfig, Remat, VisionConfig
from pdrop_jax.families.gemma3.tower import soft_tokens
from pdrop_jax.families.internvl import tower as internvl
from pdrop_jax.families.qwen2_vl.tower import patch_features
from pdrop_jax.families.smolvlm import tower as smolvlm
from pdrop_jax.model.compressor import compress
from pdrop_jax.model.layers import (
    layer_norm,
    layer_of,
    linear,
    merged_squares,
    projector,
    rematerialise,
    scan_layers,
    vision_attention,
    vision_embedding,
    vision_layer,
    vision_mlp,
)
from pdrop_jax.model.params import Params
from pdrop_jax.model.standby import Block, Time, first_tokens, seen_crops, standby_layer
from pdrop_jax.sharding import constrain, padding_for, shards
from pdrop_jax.vision_config import WINDOW

# LlavaConfig.family -> from the last hidden state of its crops to their tokens, in place of LLaVA's projector.
CROP_TOKENS: dict[str, Callable[[LlavaConfig, Params, jax.Array], jax.Array]] = {
    "gemma3": soft_tokens,
    "internvl": internvl.tile_tokens,
    **dict.fromkeys(("smolvlm", "idefics3"), smolvlm.tile_tokens),
}
# LlavaConfig.family -> the features of patches, for a tower that takes no square crops.
PATCH_FEATURES = dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), patch_features)


class Features(NamedTuple):
    """What a vision tower makes of its input.

    Attributes:
      tokens: hidden states or feature vectors, see the function that returns them.
      attention: as many numbers, float32, if ``class_attention`` was asked for: that of the class token in the last
        layer that runs, mean over heads.
      block: of the standby tokens of a stream's frames, see ``standby.Block``.
    """

    tokens: jax.Array
    attention: jax.Array | None = None
    block: Block | None = None


def vision_features(
    config: LlavaConfig,
    params: Params,
    pixels: jax.Array,
    implementation: Implementation = "auto",
    remat: Remat = "none",
    class_attention: bool = False,
    standby: Params | None = None,
    time: Time | None = None,
) -> Features:
    """(P, h, w, 3) normalised pixels -> (P, T, D_vision), the selected hidden state with CLIP's class token.

    With ``standby``, its parameters, and ``time``, what they see, the standby tokens follow: (P, T + m, D_vision).
    The tower's last norm is not part of any hidden state, as in transformers.
    """
    # A crop is a piece of work of its own: whole crops on each device need no communication within the tower.
    x = vision_embedding(config.crop_tower, params["embed"], constrain(pixels, "rows", None, None, None))

    def body(carry: Any, layer: Params, n: Any) -> tuple[Any, None]:
        x, _, extra = carry
        out = vision_layer(config.crop_tower, layer, x, implementation)
        if standby is not None and extra is not None:
            extra = standby_layer(config, standby, layer, n, x, *extra)
        return (constrain(out, "rows", None, None), x if class_attention else None, extra), None

    def run(x: jax.Array, layers: Params | list[Params], extra: tuple[jax.Array, Time] | None = None) -> Any:
        carry, _ = scan_layers(rematerialise(body, remat), (x, x if class_attention else None, extra), layers)
        return carry

    extra = None if standby is None or time is None else (first_tokens(standby, len(x)), time)
    x, last_input, extra = run(x, params["layers"], extra)
    last_layers = params["layers"]
    if config.vision.early_compression:
        x, last_layers = compressed_patches(config, params.get("compressor", {}), x), params["later_layers"]
        x, last_input, _ = run(x, last_layers)
    if extra is not None:
        x, time = jnp.concatenate([x, extra[0]], axis=1), extra[1]
    attention = None if last_input is None else class_attention_of(config, layer_of(last_layers, -1), last_input)
    return Features(x, attention, time if isinstance(time, Block) else None)


def compressed_patches(config: LlavaConfig, params: Params, x: jax.Array) -> jax.Array:
    """A layer's output (P, T, D_vision) with a quarter of the patches; a class token passes unchanged."""
    vision = config.crop_tower
    assert vision.early_compression
    class_token, patches = jnp.split(x, [vision.class_tokens], axis=1)
    windows = merged_squares(patches, vision.patches_a_side, WINDOW)
    windows = windows.reshape(*windows.shape[:2], WINDOW**2, vision.hidden_size)
    # Four patches attend to each other: no kernel for long rows would help.
    attend = functools.partial(vision_attention, vision, implementation="xla")
    mlp = functools.partial(vision_mlp, vision)
    out = jnp.concatenate([class_token, compress(vision.early_compression, params, windows, attend, mlp)], axis=1)
    return constrain(out, "rows", None, None)


def class_attention_of(config: LlavaConfig, params: Params, x: jax.Array) -> jax.Array:
    """The input of a layer (P, T, D_vision) -> (P, T) float32, attention of its first token, mean over heads."""
    h = layer_norm(params["attention_norm"], jax.lax.stop_gradient(x), config.vision.norm_eps)
    q, k = linear(params["attention"]["q"], h[:, :1])[:, 0], linear(params["attention"]["k"], h)
    logits = jnp.einsum("PNH,PTNH->PNT", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    return jax.nn.softmax(logits, axis=-1).mean(1)


def tower_features(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    implementation: Implementation = "auto",
    remat: Remat = "none",
    class_attention: bool = False,
    block: Block | None = None,
) -> Features:
    """Each row's pool of feature vectors (B, P, D), which ``Batch.feature_index`` counts; see ``image_features``."""
    crops = jnp.asarray(batch.crops)
    if not isinstance(config.vision, VisionConfig):
        assert batch.patch_layout is not None
        layout, features = jnp.asarray(batch.patch_layout), PATCH_FEATURES[config.family]
        return Features(features(config.vision, params, crops, layout, implementation, remat))
    time = block if block is not None or batch.clips is None else seen_crops(jnp.asarray(batch.clips))
    return image_features(config, params, crops, implementation, remat, class_attention, time)


@jax.named_scope("tower")
def image_features(
    config: LlavaConfig,
    params: Params,
    crops: jax.Array,
    implementation: Implementation = "auto",
    remat: Remat = "none",
    class_attention: bool = False,
    time: Time | None = None,
) -> Features:
    """The crops of each row as its pool of feature vectors.

    Args:
      crops: (B, C, h, w, 3) normalised pixels, C > 0.

    Returns:
      (B, C * (image_tokens + frame_tokens), D), dtype of the parameters: the features of all crops, then their
      features as frames of a video; with ``time`` those of their standby tokens; where images are tiled, one more
      vector, the newline. The attention is (B, ..., 1), 0 for the newline.
    """
    B, C = crops.shape[:2]
    dtype = params["vision"]["embed"]["position"].dtype
    # Crops that the devices do not divide are padded, behind the crops of each group of rows, so that these stay on the
    # devices of their rows. With ``time`` crops see others of their row, so none can be added.
    groups = shards("batch", B)
    padding = 0 if time is not None else padding_for("rows", B * C) // groups
    pixels = crops.reshape(groups, -1, *crops.shape[2:]).astype(dtype)
    pixels = jnp.pad(pixels, [(0, 0), (0, padding)] + [(0, 0)] * 3).reshape(-1, *crops.shape[2:])
    x, attention, block = vision_features(
        config, params["vision"], pixels, implementation, remat, class_attention, params.get("standby"), time
    )

    def unpadded(x: jax.Array) -> jax.Array:
        x = constrain(x, "batch", *(None,) * (x.ndim - 1)).reshape(groups, -1, *x.shape[1:])
        return x[:, : x.shape[1] - padding].reshape(B * C, *x.shape[2:])

    x, attention = unpadded(x), None if attention is None else unpadded(attention)
    x, extra = (x, None) if time is None else jnp.split(x, [x.shape[1] - config.standby_tokens], axis=1)
    D, side, merge = config.text.hidden_size, config.crop_tower.features_a_side, config.crop_tower.merge_size

    def pool(x: jax.Array) -> jax.Array:
        """From all tokens (B * C, T, N) of the tower, those that an image has, then those that a video frame has."""
        x = x if config.keep_class_token else x[:, config.vision.class_tokens :]
        x = merged_squares(x, config.crop_tower.compressed_side, merge) if merge > 1 else x
        return jnp.concatenate([x, averaged(x, side, config.frame_stride)], axis=1) if config.frame_stride else x

    def by_row(x: jax.Array) -> jax.Array:
        parts = jnp.split(x, [config.image_tokens], axis=1)
        return jnp.concatenate([part.reshape(B, C * part.shape[1], part.shape[2]) for part in parts], axis=1)

    if tokens := CROP_TOKENS.get(config.family):
        return Features(constrain(by_row(tokens(config, params, x)), "batch", None, None))
    x = by_row(projector(params["projector"], pool(x)))
    attention = None if attention is None else by_row(pool(attention[..., None])).mean(-1, keepdims=True)
    if extra is not None:
        extra = projector(params["standby"]["projector"], extra).reshape(B, -1, D)
        x = jnp.concatenate([x, extra], axis=1)
        attention = None if attention is None else jnp.pad(attention, [(0, 0), (0, extra.shape[1]), (0, 0)])
    if config.tiling:
        newline = jnp.broadcast_to(params["newline"]["embedding"], (B, 1, D))
        x = jnp.concatenate([x, newline], axis=1)
        attention = None if attention is None else jnp.pad(attention, [(0, 0), (0, 1), (0, 0)])
    return Features(constrain(x, "batch", None, None), attention, block)


def averaged(x: jax.Array, side: int, stride: int) -> jax.Array:
    """Means (P, (side // stride)**2, D) over squares of ``stride`` a side of the last ``side``**2 features of each row.

    What is left over at the right and at the bottom is ignored, as in torch's AvgPool2d.
    """
    P, D, squares = x.shape[0], x.shape[-1], side // stride
    x = x[:, -(side**2) :].reshape(P, side, side, D)[:, : squares * stride, : squares * stride]
    return x.reshape(P, squares, stride, squares, stride, D).mean((2, 4)).reshape(P, squares**2, D)
