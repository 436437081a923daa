"""Low-rank adapters (LoRA, arXiv 2106.09685): small trainable additions to frozen projections.

A projection of the decoder may carry an adapter beside its kernel, see ``params.lora_specs``::

    attention.q.lora.a      (D, R), also for k and v; (N, H, R) for o
    attention.q.lora.b      (R, N, H), (R, K, H) for k and v; (R, D) for o
    attention.q.lora.scale  ()
    mlp.up.lora.*           (D, R), (R, F), (); also for gate; for down (F, R), (R, D), ()

In a stage's stack each has the layers in front, like every array there. ``layers.linear`` adds
``scale * ((x @ a) @ b)`` to the product.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.params import Params, decoder_layer_specs, lora_specs

LORA = "lora"
_LAYER = decoder_layer_specs(TextConfig())
BLOCKS = {name: block for block in ("attention", "mlp") for name in _LAYER[block]}  # projection -> part of a layer


def add_lora(
    params: Params,
    config: LlavaConfig,
    rank: int,
    alpha: float,
    targets: Sequence[str] = tuple(BLOCKS),
    seed: int = 0,
) -> Params:
    """``params`` with adapters of ``rank`` on the decoder's projections ``targets``; what they compute is unchanged.

    As in section 4.1 of the paper a is random, b zero and the scale ``alpha / rank``. The paper leaves the distribution
    of a open; it is uniform within 1/sqrt(fan-in), as in the authors' code. Adapters are float32 whatever the dtype of
    ``params``. Those of a layer depend on ``seed`` and the layer alone, not on the schedule.

    Args:
      params: stacked by the stages of ``config.schedule``; may be abstract, under ``jax.eval_shape``.
      targets: of q, k, v, o, gate, up, down.

    Raises:
      UserError: no or unknown targets, a rank below 1, or ``params`` already has adapters.
    """
    unknown = [name for name in targets if name not in BLOCKS]
    if unknown or not targets:
        what = f"unknown LoRA targets {', '.join(unknown)}" if unknown else "LoRA without targets"
        raise UserError(f"{what}: choose from {', '.join(BLOCKS)}")
    if rank < 1:
        raise UserError(f"the LoRA rank is {rank}: it must be at least 1")
    if has_lora(params):
        raise UserError("the parameters already carry LoRA adapters: merge them first")
    L = config.text.num_layers
    layer = decoder_layer_specs(config.text)
    stages = dict(params["stages"])
    for name in targets:
        block = BLOCKS[name]
        specs = lora_specs(layer[block][name]["kernel"].stacked(L), rank)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        adapter = {part: spec.random(key) for part, spec in specs.items()}
        adapter["scale"] *= alpha / rank
        for s, (start, stop) in enumerate(config.schedule.layer_ranges(L)):
            projections = stages[str(s)][block]
            added = {**projections[name], LORA: {part: x[start:stop] for part, x in adapter.items()}}
            stages[str(s)] = {**stages[str(s)], block: {**projections, name: added}}
    return {**params, "stages": stages}


def merge_lora(params: Params) -> Params:
    """Plain parameters that compute what ``params`` does: each adapter is added to its kernel.

    Computed in float32 and rounded to the kernel's dtype. Stacked or not; without adapters ``params`` comes back.
    """

    def merge(tree: Any, stacked: bool) -> Any:
        if isinstance(tree, list):
            return [merge(layer, stacked=False) for layer in tree]
        if not isinstance(tree, dict):
            return tree
        plain = {key: merge(x, stacked) for key, x in tree.items() if key != LORA}
        if LORA in tree:
            adapter = tree[LORA]
            add = jax.vmap(_add_product) if stacked else _add_product
            plain["kernel"] = add(tree["kernel"], adapter["a"], adapter["b"], adapter["scale"])
        return plain

    return {**params, "stages": merge(params["stages"], stacked=True)}


def _add_product(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    a, b, scale = (x.astype(jnp.float32) for x in (a, b, scale))
    delta = jnp.tensordot(a, b, axes=1, precision="highest")  # the input dimensions, then the outputs'
    return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)


def has_lora(params: Params) -> bool:
    """Whether any projection of the decoder carries an adapter."""
    paths = (path for path, _ in jax.tree.leaves_with_path(params["stages"]))
    return any(getattr(key, "key", None) == LORA for path in paths for key in path)
