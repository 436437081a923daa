"""Low-rank adapters (LoRA, arXiv 2106.09685): small trainable additions to projections that stay as they are.

A decoder layer's parameters may carry ``lora`` beside its own arrays::

    lora.attention.q.a      (D, R), also of k and v; (N, H, R) of o
    lora.attention.q.b      (R, N, H), (R, K, H) of k and v; (R, D) of o
    lora.attention.q.scale  ()
    lora.mlp.up.*           (D, R), (R, F), (); also gate; of down (F, R), (R, D), ()

In a stage's stack each has its layers in front, as every array there. A projection with adapters gives
``base(x) + scale * ((x @ a) @ b)``, one without is untouched.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.layers import DecoderLayer, Params, bind, declare
from pdrop_jax.model.quantization import dequantize
from pdrop_jax.sharding import explicit

LORA = "lora"
BLOCKS = {  # projection -> the part of a layer that it belongs to
    **dict.fromkeys(("q", "k", "v", "o"), "attention"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
}


def bind_layer(config: TextConfig, params: Params) -> DecoderLayer:
    """The decoder layer with arrays ``params``, quantized or not; what its projections have of adapters is added."""
    plain = {key: x for key, x in params.items() if key != LORA}
    layer = bind(DecoderLayer, config, params=dequantize(plain))
    for block, adapters in params.get(LORA, {}).items():
        module = getattr(layer, block)
        for name, adapter in adapters.items():
            setattr(module, name, _adapted(getattr(module, name), adapter))
    return layer


def _adapted(base: Callable[[jax.Array], jax.Array], adapter: Params) -> Callable[[jax.Array], jax.Array]:
    def project(x: jax.Array) -> jax.Array:
        a, b, scale = (adapter[key].astype(x.dtype) for key in ("a", "b", "scale"))
        cut = explicit((*x.shape[:2], a.shape[-1]), "batch", None, None)
        low = jnp.tensordot(x, a, axes=a.ndim - 1, out_sharding=cut)  # (B, T, R)
        return base(x) + jax.lax.stop_gradient(scale) * jnp.tensordot(low, b, axes=1)

    return project


def add_lora(
    params: Params,
    config: LlavaConfig,
    rank: int,
    alpha: float,
    targets: Sequence[str] = tuple(BLOCKS),
    seed: int = 0,
) -> Params:
    """``params`` with adapters of ``rank`` on the decoder's projections ``targets``; what they compute is unchanged.

    As in section 4.1 of the paper a is random, b zero and the scale ``alpha / rank``. The paper leaves a's spread
    open; it is uniform within 1/sqrt(fan-in), as in the authors' code. Adapters are float32 whatever the dtype of
    ``params``. Those of a layer depend on ``seed`` and the layer alone, not on the schedule.

    Args:
      params: stacked by the stages of ``config.schedule``; may be abstract, under ``jax.eval_shape``.
      targets: of q, k, v, o, gate, up, down.

    Raises:
      UserError: no or unknown targets, a rank below 1, or ``params`` has adapters already.
    """
    unknown = [name for name in targets if name not in BLOCKS]
    if unknown or not targets:
        what = f"unknown LoRA targets {', '.join(unknown)}" if unknown else "LoRA without targets"
        raise UserError(f"{what}: choose of {', '.join(BLOCKS)}")
    if rank < 1:
        raise UserError(f"a LoRA rank of {rank} adds nothing: give 1 or more")
    if has_lora(params):
        raise UserError("the parameters carry LoRA adapters already: merge them first")
    L = config.text.num_layers
    ranges = config.schedule.layer_ranges(L)
    layer = declare(DecoderLayer, config.text)
    added: list[Params] = [{} for _ in ranges]
    for name in targets:
        block = BLOCKS[name]
        shape = layer[block][name]["kernel"].shape
        inputs = 2 if name == "o" else 1  # axes
        bound = 1 / math.sqrt(math.prod(shape[:inputs]))
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        adapter = {
            "a": jax.random.uniform(key, (L, *shape[:inputs], rank), jnp.float32, -bound, bound),
            "b": jnp.zeros((L, rank, *shape[inputs:]), jnp.float32),
            "scale": jnp.full((L,), alpha / rank, jnp.float32),
        }
        for stage, (start, stop) in zip(added, ranges, strict=True):
            stage.setdefault(block, {})[name] = {leaf: x[start:stop] for leaf, x in adapter.items()}
    stages = params["stages"]
    return {**params, "stages": {str(s): {**stages[str(s)], LORA: adapters} for s, adapters in enumerate(added)}}


def merge_lora(params: Params) -> Params:
    """Plain parameters that compute what ``params`` does: each adapter is folded into its kernel.

    Computed in float32 and rounded to the kernel's dtype. Stacked or not; without adapters ``params`` comes back.
    """

    def merged(layers: Any) -> Any:
        if isinstance(layers, list):
            return [_merge(layer, _fold) for layer in layers]
        return _merge(layers, jax.vmap(_fold))

    return {**params, "stages": {s: merged(layers) for s, layers in params["stages"].items()}}


def _merge(layer: Params, fold: Callable[..., jax.Array]) -> Params:
    plain = {key: x for key, x in layer.items() if key != LORA}
    for block, adapters in layer.get(LORA, {}).items():
        plain[block] = dict(plain[block])
        for name, adapter in adapters.items():
            kernel = fold(plain[block][name]["kernel"], adapter["a"], adapter["b"], adapter["scale"])
            plain[block][name] = {**plain[block][name], "kernel": kernel}
    return plain


def _fold(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    a, b, scale = (x.astype(jnp.float32) for x in (a, b, scale))
    delta = jnp.tensordot(a, b, axes=1, precision="highest")  # the inputs' axes, then the outputs'
    return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)


def has_lora(params: Params) -> bool:
    """Whether any layer of the decoder carries adapters."""
    stages = params["stages"].values()
    return any(LORA in layer for layers in stages for layer in (layers if isinstance(layers, list) else [layers]))
