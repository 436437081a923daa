"""The blocks of the two transformers: each module declares its parameters and has a pure ``__call__``.

Modules are only ever built abstractly. ``declare`` gives a block's parameters as a nested dict of shapes,
``bind`` puts arrays of that structure behind the block's ``__call__`` inside a trace.

Dims: B batch, T tokens, N query heads, K key-value heads, H head dim, D model, F mlp, L layers.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from pdrop_jax.config import TextConfig, VisionConfig
from pdrop_jax.model.attention import Implementation, attention
from pdrop_jax.sharding import dot_general, explicit

M = TypeVar("M", bound=nnx.Module)
Params = dict[str, Any]  # nested dict of arrays
Remat = Literal["none", "dots", "full"]  # what a layer keeps for its gradient, see ``rematerialise``
Rope = tuple[jax.Array, jax.Array]  # cos, sin: (B, T, H/2) float32
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]  # q BTNH, k BTKH, v BTKH -> BTNH, cache

linear = functools.partial(nnx.Linear, use_bias=False, dot_general=dot_general)
linear_general = functools.partial(nnx.LinearGeneral, dot_general=dot_general)
layer_norm = functools.partial(nnx.LayerNorm, use_fast_variance=False)


class RMSNorm(nnx.RMSNorm):
    def __init__(self, D: int, eps: float, *, rngs: nnx.Rngs):
        super().__init__(D, epsilon=eps, rngs=rngs)


class Attention(nnx.Module):
    """Projections of multi-head or grouped-query attention."""

    def __init__(self, D: int, N: int, K: int, H: int, *, qkv_bias: bool, output_bias: bool, rngs: nnx.Rngs):
        project = functools.partial(linear_general, D, use_bias=qkv_bias, rngs=rngs)
        self.q = project((N, H))
        self.k = project((K, H))
        self.v = project((K, H))
        self.o = linear_general((N, H), D, axis=(-2, -1), use_bias=output_bias, rngs=rngs)


class GatedMLP(nnx.Module):
    """LLaMA's SwiGLU."""

    def __init__(self, D: int, F: int, *, rngs: nnx.Rngs):
        self.gate = linear(D, F, rngs=rngs)
        self.up = linear(D, F, rngs=rngs)
        self.down = linear(F, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """A LLaMA decoder layer. (B, T, D) -> (B, T, D); ``attend`` decides what the queries see and keeps the cache."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.attention_norm = RMSNorm(D, config.norm_eps, rngs=rngs)
        self.attention = Attention(D, N, K, H, qkv_bias=config.qkv_bias, output_bias=config.output_bias, rngs=rngs)
        self.mlp_norm = RMSNorm(D, config.norm_eps, rngs=rngs)
        self.mlp = GatedMLP(D, config.intermediate_size, rngs=rngs)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        h = self.attention_norm(x)
        q, k = rotate(self.attention.q(h), rope), rotate(self.attention.k(h), rope)
        out, cache = attend(q, k, self.attention.v(h))
        x = x + self.attention.o(out)
        return x + self.mlp(self.mlp_norm(x)), cache


class VisionMLP(nnx.Module):
    def __init__(self, D: int, F: int, activation: str, *, rngs: nnx.Rngs):
        self.up = linear(D, F, use_bias=True, rngs=rngs)
        self.down = linear(F, D, use_bias=True, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.up(x)
        if self.activation == "quick_gelu":
            return self.down(h * jax.nn.sigmoid(1.702 * h))
        return self.down(jax.nn.gelu(h, approximate=self.activation == "gelu_tanh"))


class VisionLayer(nnx.Module):
    """A CLIP or SigLIP encoder layer: pre-norm, full attention. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        D, N, H = config.hidden_size, config.num_heads, config.head_dim
        self.attention_norm = layer_norm(D, epsilon=config.norm_eps, rngs=rngs)
        self.attention = Attention(D, N, N, H, qkv_bias=True, output_bias=True, rngs=rngs)
        self.mlp_norm = layer_norm(D, epsilon=config.norm_eps, rngs=rngs)
        self.mlp = VisionMLP(D, config.intermediate_size, config.activation, rngs=rngs)

    def __call__(self, x: jax.Array, implementation: Implementation) -> jax.Array:
        h = self.attention_norm(x)
        q, k, v = self.attention.q(h), self.attention.k(h), self.attention.v(h)
        x = x + self.attention.o(attention(q, k, v, causal=False, implementation=implementation))
        return x + self.mlp(self.mlp_norm(x))


class VisionEmbedding(nnx.Module):
    """Patches and positions of a vision tower, CLIP's with a class token and a norm. (B, h, w, 3) -> (B, T, D)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        D, P, self.clip = config.hidden_size, config.patch_size, config.kind == "clip"
        self.patch = nnx.Conv(3, D, (P, P), strides=P, padding="VALID", use_bias=not self.clip, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((config.class_tokens + config.num_patches, D)))
        if self.clip:
            self.class_token = nnx.Param(jnp.zeros((D,)))
            self.norm = layer_norm(D, epsilon=config.norm_eps, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch(pixels)
        B, _, _, D = patches.shape
        tokens = patches.reshape(B, -1, D)
        if not self.clip:
            return tokens + self.position[...]
        cut = explicit((B, 1, D), "batch", None, None)
        class_token = jnp.broadcast_to(self.class_token[...], (B, 1, D), out_sharding=cut)
        return self.norm(jnp.concatenate([class_token, tokens], axis=1) + self.position[...])


class Projector(nnx.Module):
    """Vision features to token embeddings: ``num_layers`` linear layers with GELU between them."""

    def __init__(self, vision_size: int, D: int, num_layers: int, *, rngs: nnx.Rngs):
        self.num_layers = num_layers
        for n in range(num_layers):
            setattr(self, f"linear_{n}", linear(D if n else vision_size, D, use_bias=True, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        for n in range(self.num_layers):
            x = getattr(self, f"linear_{n}")(jax.nn.gelu(x, approximate=False) if n else x)
        return x


def rope_tables(config: TextConfig, positions: jax.Array) -> Rope:
    """cos and sin of the rotary angles at ``positions`` (B, T) int32 (RoFormer, section 3.4)."""
    H = config.head_dim
    inverse = 1.0 / config.rope_theta ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling is not None:
        # Long wavelengths are stretched by the factor, short ones stay, those between are blended (Llama 3.1).
        turns = scaling.original_max_length * inverse / (2 * jnp.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        inverse = blend * inverse + (1 - blend) * inverse / scaling.factor
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles), jnp.sin(angles)


def rope_at(tables: Rope, positions: jax.Array) -> Rope:
    """The rows of ``tables`` (1, S, H/2) at ``positions`` (B, T) int32 < S.

    XLA computes a gather once, while it fuses a sine into its readers and takes it anew for every head and layer.
    """
    cut = explicit((*positions.shape, tables[0].shape[-1]), "batch", None, None)
    cos, sin = (table[0].at[positions].get(out_sharding=cut) for table in tables)
    return cos, sin


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates ``x`` (B, T, N, H) by ``rope`` in float32; the halves of H are the pairs, as in Hugging Face's LLaMA."""
    cos, sin = (table[:, :, None] for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


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


@functools.cache
def _split(cls: Callable[..., nnx.Module], args: tuple) -> tuple[nnx.GraphDef, Params]:
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(*args, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def declare(cls: type[nnx.Module], *args: Any) -> Params:
    """The parameters of ``cls(*args)`` as a nested dict of ``jax.ShapeDtypeStruct``."""
    return _split(cls, args)[1]


def bind(cls: type[M], *args: Any, params: Params) -> M:
    """``cls(*args)`` with the arrays ``params`` in place of its own."""
    return nnx.merge(_split(cls, args)[0], params)
