"""Qwen's vision tower: windows of patches -> features, one for each merged square of patches.

The host lays patches out in windows (``inputs``), so that attention inside windows is attention over the last axis and
nothing is permuted here. On a mesh a device has whole rows, as it has
whole crops. Dims: B rows, C windows, U patches of a window, N heads, H head dim, D model, L layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdrop_jax.config import Implementation, Remat
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.model.attention import attention, segment_attention
from pdrop_jax.model.compression import PATCHES
from pdrop_jax.model.compressor import compress
from pdrop_jax.model.layers import (
    activate,
    gated_mlp,
    layer_norm,
    layer_of,
    linear,
    rematerialise,
    rms_norm,
    scan_layers,
)
from pdrop_jax.model.rope import Rope, rotate
from pdrop_jax.model.specs import Params
from pdrop_jax.sharding import constrain

ROPE_BASE = 10000.0


@jax.named_scope("tower")
def patch_features(
    config: QwenVisionConfig,
    params: Params,
    patches: jax.Array,
    layout: jax.Array,
    implementation: Implementation = "auto",
    remat: Remat = "none",
) -> jax.Array:
    """The features of each row's pictures, in the order of its windows.

    Args:
      params: of the whole model.
      patches: (B, C, U, F) normalised pixels; a merged square is ``merge_size``**2 neighbours along U.
      layout: (B, C, U, 3) int32: row and column of a patch in its picture, and its frame, counted from 1 over the
        row's pictures; 0 for padding. With learned positions (B, C, U, 5), also the picture's rows and columns.

    Returns:
      (B, P, D), P = C * U // merge_size**2, or with early compression a quarter of that, dtype of the parameters;
      finite and meaningless where there is only padding. With A layers for DeepStack (B, (1 + A) * P, D): the features,
      then those of each of these layers.
    """
    B, C, U, F = patches.shape
    vision, P, compression = params["vision"], C * U, config.early_compression
    dtype = vision["embed"]["patch"]["kernel"].dtype
    x = linear(vision["embed"]["patch"], constrain(patches.reshape(B, P, F).astype(dtype), "rows", None, None))
    layout = layout.reshape(B, P, -1)
    if config.position_side is not None:
        x = x + learned_positions(config, vision["embed"]["position"], layout)
    rope, frame = axial_rope(config, layout[..., :2]), layout[..., 2]
    run = functools.partial(run_layers, config, implementation=implementation, remat=remat)
    taken = [jnp.zeros_like(x) for _ in config.deepstack_layers] if compression is None else []
    x, taken = run(vision["layers"], x, taken, rope, frame.reshape(B, C, U), first=0)
    if compression is not None:
        x = compressed_patches(config, vision.get("compressor", {}), x, rope)
        # A compressed patch stands in the middle of those that it is made of.
        positions = layout[..., :2].reshape(B, -1, PATCHES, 2).astype(jnp.float32).mean(2)
        rope, frame = axial_rope(config, positions), frame[:, ::PATCHES].reshape(B, C, U // PATCHES)
        taken = [jnp.zeros_like(x) for _ in config.deepstack_layers]
        x, taken = run(vision["later_layers"], x, taken, rope, frame, first=compression.after + 1)
    features = [merge(config, params["projector"], x)]
    for n, early in enumerate(taken):
        features.append(merge(config, params["projector"]["deepstack"][str(n)], early, joined=True))
    return constrain(jnp.concatenate(features, axis=1), "batch", None, None)


def run_layers(
    config: QwenVisionConfig,
    layers: Params | list[Params],
    x: jax.Array,
    taken: list[jax.Array],
    rope: Rope,
    frame: jax.Array,
    first: int,
    implementation: Implementation,
    remat: Remat,
) -> tuple[jax.Array, list[jax.Array]]:
    """A stack or list of layers, of which the tower's layer ``first`` is the first one.

    Args:
      x: (B, P, D).
      taken: (B, P, D) of each layer for DeepStack, or empty if none of them is here.
      frame: (B, C, U) int32, see ``patch_features``; P = C * U.
    """
    B, C, U = frame.shape
    depth = len(layers) if isinstance(layers, list) else jax.tree.leaves(layers)[0].shape[0]
    numbers = np.arange(first, first + depth)
    full = np.isin(numbers, config.full_layers) | (config.window_size is None)

    def run_layer(x: jax.Array, layer: Params, whole: bool) -> jax.Array:
        # Cut into windows before the products rather than behind rope, where XLA for TPUs would copy q and k.
        shape = (B, C * U) if whole else (B * C, U)
        segment, (cos, sin) = frame.reshape(shape), (z.reshape(*shape, -1) for z in rope)
        attend = functools.partial(segment_attention, segment=segment, implementation=implementation)
        x = x + _attention(config, layer, x.reshape(*shape, -1), (cos, sin), attend).reshape(x.shape)
        return constrain(x + _mlp(config, layer, x), "rows", None, None)

    # A stack is scanned by periods, in each of which the same layers see whole pictures.
    period = _period(full)
    groups: Any
    if isinstance(layers, list):
        groups = [layers[n : n + period] for n in range(0, len(layers), period)]
    else:
        groups = jax.tree.map(lambda z: z.reshape(-1, period, *z.shape[1:]), layers)

    def body(carry: Any, group: Params | list[Params], number: Any) -> tuple[Any, None]:
        x, taken = carry
        for n in range(period):
            layer = rematerialise(functools.partial(run_layer, whole=bool(full[n])), remat)
            x = layer(x, layer_of(group, n))
            taken = take(config, taken, x, number * period + n + first) if taken else taken
        return (x, taken), None

    (x, taken), _ = scan_layers(body, (x, taken), groups)
    return x, taken


def compressed_patches(config: QwenVisionConfig, params: Params, x: jax.Array, rope: Rope) -> jax.Array:
    """A layer's output (B, P, D), in which the patches of a square follow each other -> (B, P // 4, D)."""
    assert config.early_compression
    B, P, D = x.shape
    squares = [z.reshape(B * P // PATCHES, PATCHES, -1) for z in rope]

    def attend(layer: Params, x: jax.Array) -> jax.Array:
        see_all = functools.partial(attention, causal=False, implementation="xla")
        return _attention(config, layer, x, (squares[0], squares[1]), see_all)

    windows = x.reshape(B, P // PATCHES, PATCHES, D)
    out = compress(config.early_compression, params, windows, attend, functools.partial(_mlp, config))
    return constrain(out, "rows", None, None)


def _period(full: np.ndarray) -> int:
    """The number of layers after which ``full`` (L,) repeats, a divisor of L."""
    L = len(full)
    return next(n for n in range(1, L + 1) if L % n == 0 and (full.reshape(-1, n) == full[:n]).all())


def take(config: QwenVisionConfig, taken: list[jax.Array], x: jax.Array, n: Any) -> list[jax.Array]:
    """``taken``, (B, P, D) of each layer for DeepStack, with ``x``, the output of layer ``n``, if it is one of them."""
    pairs = list(zip(config.deepstack_layers, taken, strict=True))
    if isinstance(n, int):
        return [x if n == layer else old for layer, old in pairs]
    return [jax.lax.cond(n == layer, lambda old, new: new, lambda old, new: old, old, x) for layer, old in pairs]


def merge(config: QwenVisionConfig, params: Params, x: jax.Array, joined: bool = False) -> jax.Array:
    """Patches (B, P, D_vision) -> tokens (B, P // merge_size**2, D): neighbours are joined, then projected.

    Args:
      joined: the norm is over the joined neighbours, as for DeepStack, instead of each patch.
    """
    B, P, _ = x.shape
    squares = B, P // config.merge_size**2, -1
    x = _norm(config, params["norm"], x.reshape(squares) if joined else x).reshape(squares)
    return linear(params["linear_1"], jax.nn.gelu(linear(params["linear_0"], x), approximate=False))


def learned_positions(config: QwenVisionConfig, table: jax.Array, layout: jax.Array) -> jax.Array:
    """The learned positions (side**2, D), resized to each picture's grid, at its patches (B, P, 5) -> (B, P, D).

    Bilinear between the four nearest; the corners of the square are those of the grid.
    """
    assert config.position_side is not None
    side, table = config.position_side, constrain(table, None, None)
    at = layout[..., :2].astype(jnp.float32) * (side - 1) / jnp.maximum(layout[..., 3:] - 1, 1)
    low = jnp.floor(at).astype(jnp.int32)
    share, high = at - low, jnp.minimum(low + 1, side - 1)
    found = jnp.zeros((*layout.shape[:2], table.shape[1]), jnp.float32)
    for row, row_weight in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
        for column, weight in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
            found = found + table[row * side + column] * (row_weight * weight)[..., None]
    return found.astype(table.dtype)


def axial_rope(config: QwenVisionConfig, positions: jax.Array) -> Rope:
    """cos and signed sin (B, P, H) at rows and columns (B, P, 2) int32: each turns half of a head's pairs."""
    H = config.head_dim
    inverse = 1.0 / ROPE_BASE ** (jnp.arange(0, H // 2, 2, dtype=jnp.float32) / (H // 2))
    angles = (positions[..., None].astype(jnp.float32) * inverse).reshape(*positions.shape[:2], H // 2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def _norm(config: QwenVisionConfig, params: Params, x: jax.Array) -> jax.Array:
    return (rms_norm if config.gated else layer_norm)(params, x, config.norm_eps)


def _attention(
    config: QwenVisionConfig, layer: Params, x: jax.Array, rope: Rope, attend: Callable[..., jax.Array]
) -> jax.Array:
    """What the attention of a layer adds to its input (B, P, D)."""
    h = _norm(config, layer["attention_norm"], x)
    q, k, v = jnp.moveaxis(linear(layer["attention"]["qkv"], h), 2, 0)
    return linear(layer["attention"]["o"], attend(rotate(q, rope), rotate(k, rope), v), inputs=2)


def _mlp(config: QwenVisionConfig, layer: Params, x: jax.Array) -> jax.Array:
    """What the MLP of a layer adds to its input."""
    h, mlp = _norm(config, layer["mlp_norm"], x), layer["mlp"]
    if config.activation is None:
        return gated_mlp(mlp, h)
    return linear(mlp["down"], activate(config.activation, linear(mlp["up"], h)))
