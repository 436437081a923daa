"""The blocks of the two transformers, as functions of (config, params, x).

Their parameters are declared in ``params``. ``linear`` alone knows about biases, int8 weights and LoRA adapters.

Dims: B batch, T tokens, N query heads, K key-value heads, H head dim, D model, F mlp, L layers.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pdrop_jax.config import Activation, Implementation, Remat, TextConfig, VisionConfig
from pdrop_jax.model.attention import attention
from pdrop_jax.model.quantization import is_quantized, quantized_product
from pdrop_jax.model.rope import Rope, rotate
from pdrop_jax.model.specs import Params
from pdrop_jax.sharding import constrain_hidden

QK_NORM_EPS = 1e-6  # of a vision tower, whatever its other norms have (InternViT)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]  # q BTNH, k BTKH, v BTKH -> BTNH, cache


def linear(params: Params, x: jax.Array, inputs: int = 1, summed: str | None = None) -> jax.Array:
    """``x @ kernel``, plus the bias and the LoRA adapter if there are any: (B, T, *inputs) -> (B, T, *outputs).

    Args:
      inputs: how many of the last dimensions of ``x`` are summed over.
      summed: logical axis of the first of them, which products of integers over several devices need to know.
    """
    kernel = params["kernel"]
    y = quantized_product(x, kernel, inputs, summed) if is_quantized(kernel) else jnp.tensordot(x, kernel, axes=inputs)
    if "bias" in params:
        y = y + params["bias"]
    if "lora" in params:
        a, b, scale = (params["lora"][key].astype(x.dtype) for key in ("a", "b", "scale"))
        low_rank = jnp.tensordot(x, a, axes=inputs)  # (B, T, R)
        y = y + jax.lax.stop_gradient(scale) * jnp.tensordot(low_rank, b, axes=1)
    return y


@jax.named_scope("norm")
def rms_norm(params: Params, x: jax.Array, eps: float, plus_one: bool = False) -> jax.Array:
    """Statistics and scaling in float32, rounded once to the dtype of ``x``.

    Args:
      plus_one: scales by 1 + the weight (Gemma).
    """
    wide, scale = x.astype(jnp.float32), params["scale"]
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    if plus_one:
        scale = 1 + scale.astype(jnp.float32)
    return (wide * (jax.lax.rsqrt(variance + eps) * scale)).astype(x.dtype)


def text_norm(config: TextConfig, params: Params, x: jax.Array) -> jax.Array:
    """A norm of the decoder."""
    return rms_norm(params, x, config.norm_eps, config.norm_plus_one)


def layer_norm(params: Params, x: jax.Array, eps: float) -> jax.Array:
    """As ``rms_norm``, with mean and bias. The variance is that of the centred values: it cannot cancel out."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * (jax.lax.rsqrt(variance + eps) * params["scale"]) + params["bias"]).astype(x.dtype)


def decoder_layer(
    config: TextConfig, params: Params, x: jax.Array, rope: Rope | None, attend: Attend
) -> tuple[jax.Array, Any]:
    """A decoder layer of LLaMA's kind. (B, T, D) -> (B, T, D) and whatever cache ``attend`` returns.

    Args:
      rope: None leaves the rotation to ``attend``.
      attend: decides what the queries see and what is cached.
    """
    h = text_norm(config, params["attention_norm"], x)
    q, k = project_query(config, params, h, rope), project_key(config, params, h, rope)
    out, cache = attend(q, k, linear(params["attention"]["v"], h))
    out = linear(params["attention"]["o"], out, inputs=2, summed="heads")
    if config.post_norms:
        out = text_norm(config, params["attention_post_norm"], out)
    x = constrain_hidden(x + out)
    out = gated_mlp(params["mlp"], text_norm(config, params["mlp_norm"], x), config.activation)
    if config.post_norms:
        out = text_norm(config, params["mlp_post_norm"], out)
    return constrain_hidden(x + out), cache


def project_query(config: TextConfig, params: Params, h: jax.Array, rope: Rope | None) -> jax.Array:
    """Queries (B, T, N, H) of a layer's normed input (B, T, D), rotated unless ``rope`` is None.

    Attention divides by the square root of the head dim: what a config wants instead is made up for here.
    """
    q = _head_norm_and_rope(config, params, "q", h, rope)
    if config.query_scalar in (None, config.head_dim):
        return q
    return (q.astype(jnp.float32) * (config.head_dim / config.query_scalar) ** 0.5).astype(q.dtype)


def project_key(config: TextConfig, params: Params, h: jax.Array, rope: Rope | None) -> jax.Array:
    """Keys (B, T, K, H), as ``project_query``."""
    return _head_norm_and_rope(config, params, "k", h, rope)


def _head_norm_and_rope(config: TextConfig, params: Params, name: str, h: jax.Array, rope: Rope | None) -> jax.Array:
    x = linear(params["attention"][name], h)
    if config.qk_norm:
        x = text_norm(config, params["attention"][f"{name}_norm"], x)
    return x if rope is None else rotate(x, rope)


def gated_mlp(params: Params, x: jax.Array, activation: Literal["silu", "gelu_tanh"] = "silu") -> jax.Array:
    """LLaMA's SwiGLU, or with GELU Gemma's."""
    gate = linear(params["gate"], x)
    gate = jax.nn.silu(gate) if activation == "silu" else activate(activation, gate)
    return linear(params["down"], gate * linear(params["up"], x), summed="mlp")


def vision_embedding(config: VisionConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Patches and positions, for CLIP and InternViT behind a class token. (P, h, w, 3) -> (P, T, D)."""
    strides = (config.patch_size, config.patch_size)
    patches = jax.lax.conv_general_dilated(
        pixels, params["patch"]["kernel"], strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    P, _, _, D = patches.shape
    tokens = patches.reshape(P, -1, D)
    if "bias" in params["patch"]:
        tokens = tokens + params["patch"]["bias"]
    if config.class_tokens:
        tokens = jnp.concatenate([jnp.broadcast_to(params["class_token"], (P, 1, D)), tokens], axis=1)
    tokens = tokens + params["position"]
    return layer_norm(params["norm"], tokens, config.norm_eps) if "norm" in params else tokens


def vision_layer(config: VisionConfig, params: Params, x: jax.Array, implementation: Implementation) -> jax.Array:
    """A layer of a vision transformer: pre-norm, full attention. (P, T, D) -> (P, T, D)."""
    out = vision_attention(config, params, x, implementation)
    x = x + (out * params["attention_scale"]["scale"] if config.layer_scale else out)
    out = vision_mlp(config, params, x)
    return x + (out * params["mlp_scale"]["scale"] if config.layer_scale else out)


def vision_attention(config: VisionConfig, params: Params, x: jax.Array, implementation: Implementation) -> jax.Array:
    """What the attention of a layer adds to its input, before it is scaled. (P, T, D) -> (P, T, D)."""
    h = _vision_norm(config, params["attention_norm"], x)
    q, k, v = (linear(params["attention"][name], h) for name in "qkv")
    if config.qk_norm:
        q, k = (
            rms_norm(params["attention"][f"{name}_norm"], y.reshape(x.shape), QK_NORM_EPS).reshape(y.shape)
            for name, y in (("q", q), ("k", k))
        )
    out = attention(q, k, v, causal=False, implementation=implementation)
    return linear(params["attention"]["o"], out, inputs=2)


def vision_mlp(config: VisionConfig, params: Params, x: jax.Array) -> jax.Array:
    """What the MLP of a layer adds to its input, before it is scaled."""
    h = _vision_norm(config, params["mlp_norm"], x)
    return linear(params["mlp"]["down"], activate(config.activation, linear(params["mlp"]["up"], h)))


def _vision_norm(config: VisionConfig, params: Params, x: jax.Array) -> jax.Array:
    return (rms_norm if config.rms_norm else layer_norm)(params, x, config.norm_eps)


def activate(activation: Activation, x: jax.Array) -> jax.Array:
    if activation == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=activation == "gelu_tanh")


def projector(params: Params, x: jax.Array) -> jax.Array:
    """Vision features to token embeddings: linear layers with GELU between them. (P, T, D_vision) -> (P, T, D)."""
    for n in range(sum(name.startswith("linear_") for name in params)):
        x = linear(params[f"linear_{n}"], jax.nn.gelu(x, approximate=False) if n else x)
    return x


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


def layer_of(layers: Params | list[Params], n: int) -> Params:
    """The n-th layer of a stack or a list."""
    return layers[n] if isinstance(layers, list) else jax.tree.map(lambda x: x[n], layers)


def scan_layers(body: Callable, carry: Any, layers: Params | list[Params]) -> tuple[Any, Any]:
    """``body(carry, params, n) -> (carry, y)`` over a stack of layers by ``lax.scan``, or over a list by a loop."""
    if not isinstance(layers, list):
        L = jax.tree.leaves(layers)[0].shape[0]
        if L == 0:  # scan would still trace the body, which may not fit an empty cache
            return carry, None
        return jax.lax.scan(lambda carry, layer: body(carry, *layer), carry, (layers, jnp.arange(L)))
    ys = []
    for n, params in enumerate(layers):
        carry, y = body(carry, params, n)
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys) if ys else None


def rematerialise(layer: Callable, remat: Remat) -> Callable:
    """``layer`` keeping for its gradient everything ("none"), its matrix products ("dots") or its input ("full")."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if remat == "full" else policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
