"""Standby tokens of the vision tower: a few learned tokens for each picture stand for all its patches (POINTS-Long).

In every layer standby tokens see all patches of their crop and each other. Patches see only patches, so that their
features are those of the tower without standby tokens. Attention is the tower's own; the MLPs and the projector are
copies of the pretrained ones, which are trained for standby tokens. Behind each of the last layers is attention over
time: the standby tokens of a frame see those of the frames of its block up to itself.

What the paper's notes leave open is decided here: norms are shared, attention over time begins with an output of zero,
and the frames that are adjacent are those of a block, so that a frame needs nothing of the frames before its block.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pdrop_jax.config import LlavaConfig, VisionConfig
from pdrop_jax.model.attention import attention
from pdrop_jax.model.layers import layer_norm, linear, vision_mlp
from pdrop_jax.model.specs import Params
from pdrop_jax.model.standby_specs import temporal_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """Keys and values over time of the frames of one block, which come one at a time. F frames, m standby tokens.

    Attributes:
      k, v: (L, F * m, N, H), of the layers with attention over time.
      at: () int32, which frame of the block is the newest, from 0 on.
    """

    k: jax.Array
    v: jax.Array
    at: jax.Array


Time = jax.Array | Block  # seen (B, C, C) bool, which crops of its row each crop sees; or the block of a single crop


def empty_block(config: LlavaConfig, dtype: DTypeLike) -> Block:
    """The block in front of the first frame."""
    assert config.standby
    vision, slots = config.crop_tower, config.standby.frames * config.standby.tokens
    zeros = jnp.zeros((temporal_layers(config), slots, vision.num_heads, vision.head_dim), dtype)
    return Block(zeros, zeros, jnp.int32(0))


def first_tokens(params: Params, crops: int) -> jax.Array:
    """The learned tokens for each crop, (P, m, D)."""
    tokens = jnp.asarray(params["tokens"]["embedding"])
    return jnp.broadcast_to(tokens, (crops, *tokens.shape))


def standby_layer(
    config: LlavaConfig,
    params: Params,
    layer: Params,
    n: jax.Array | int,
    patches: jax.Array,
    x: jax.Array,
    time: Time,
) -> tuple[jax.Array, Time]:
    """What layer number ``n`` of the tower makes of the standby tokens.

    Args:
      params: those of ``standby_specs``.
      layer: the tower's layer.
      patches: (P, T, D), its input.
      x: (P, m, D), standby tokens.
      time: P = B * C if it says which crops each crop sees, and 1 for a block.

    Returns:
      (P, m, D), and ``time``, a block with the frame's own keys and values.
    """
    vision = config.crop_tower
    h, among = (layer_norm(layer["attention_norm"], y, vision.norm_eps) for y in (x, patches))
    q = linear(layer["attention"]["q"], h)
    k, v = (jnp.concatenate([linear(layer["attention"][name], y) for y in (among, h)], axis=1) for name in ("k", "v"))
    # Few queries: no kernel helps.
    x = x + linear(layer["attention"]["o"], attention(q, k, v, causal=False, implementation="xla"), inputs=2)
    mlp, first = _row(params["mlps"], n), config.vision_layers - temporal_layers(config)
    x = x + vision_mlp(vision, {**layer, "mlp": mlp}, x)
    # Layers before the first one with attention over time compute that one's, which is not used; in a block the first
    # one overwrites what they have written.
    own = jnp.maximum(n - first, 0)
    out, time = over_time(vision, _row(params["temporal"], own), x, time, own)
    return x + jnp.where(n >= first, out, 0), time


def _row(stack: Params, n: jax.Array | int) -> Params:
    """A layer of a stack by a number that a scan counts."""
    return jax.tree.map(lambda x: jnp.asarray(x)[n], stack)


def over_time(
    config: VisionConfig, params: Params, x: jax.Array, time: Time, n: jax.Array | int = 0
) -> tuple[jax.Array, Time]:
    """Attention of each crop's standby tokens (P, m, D) to those of the crops that it sees, and ``time`` for the next.

    Args:
      n: the layer's row in a block.
    """
    m, D = x.shape[1:]
    rows = 1 if isinstance(time, Block) else len(time)
    h = layer_norm(params["norm"], x, config.norm_eps).reshape(rows, -1, D)
    q, k, v = (linear(params["attention"][name], h) for name in "qkv")
    if isinstance(time, Block):
        start = (n, time.at * m, 0, 0)
        k, v = (jax.lax.dynamic_update_slice(*z, start) for z in ((time.k, k), (time.v, v)))
        time, k, v = Block(k, v, time.at), k[n][None], v[n][None]
        seen = jnp.arange(k.shape[1]) < (time.at + 1) * m
    else:
        seen = jnp.repeat(jnp.repeat(time, m, axis=1), m, axis=2)[:, None]
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(jnp.where(seen, logits, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
    out = linear(params["attention"]["o"], jnp.einsum("BNTS,BSNH->BTNH", probs, v), inputs=2)
    return out.reshape(x.shape), time


def seen_crops(clips: jax.Array) -> jax.Array:
    """Which crops each crop sees, (B, C, C) bool: those with the same number in ``clips`` (B, C) up to itself."""
    C = clips.shape[1]
    return (clips[:, :, None] == clips[:, None]) & jnp.tri(C, dtype=bool)
