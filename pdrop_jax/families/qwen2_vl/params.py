"""The arrays of Qwen's vision tower and of the merger behind it."""

from pdrop_jax.config import LlavaConfig
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.model.specs import ParamSpec, Specs, linear_specs, norm_specs


def specs(config: LlavaConfig) -> Specs:
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    return {
        "vision": {"embed": embedding_specs(vision), "layer": layer_specs(vision)},
        "projector": merger_specs(vision, config.text.hidden_size),
    }


def embedding_specs(config: QwenVisionConfig) -> Specs:
    D, side = config.hidden_size, config.position_side
    patch = linear_specs((config.patch_values, D), (None, "model"), "vision", bias=side is not None)
    if side is None:
        return {"patch": patch}
    return {"patch": patch, "position": ParamSpec((side**2, D), (None, "model"), "embedding", "vision")}


def layer_specs(config: QwenVisionConfig) -> Specs:
    D, N, H, F = config.hidden_size, config.num_heads, config.head_dim, config.intermediate_size
    names = ("gate", "up") if config.gated else ("up",)
    mlp = {name: linear_specs((D, F), ("model", None), "vision", bias=True) for name in names}
    return {
        "attention_norm": norm_specs(D, "vision", bias=not config.gated),
        "attention": {
            "qkv": linear_specs((D, 3, N, H), ("model", None, None, None), "vision", bias=True),
            "o": linear_specs((N, H, D), (None, None, "model"), "vision", inputs=(0, 1), bias=True),
        },
        "mlp_norm": norm_specs(D, "vision", bias=not config.gated),
        "mlp": {**mlp, "down": linear_specs((F, D), (None, "model"), "vision", bias=True)},
    }


def merger_specs(config: QwenVisionConfig, D: int) -> Specs:
    """The merger is what connects tower and decoder, so it is trained as the projector."""
    merged = config.hidden_size * config.merge_size**2

    def merger(normed: int) -> Specs:
        return {
            "norm": norm_specs(normed, "projector", bias=not config.gated),
            "linear_0": linear_specs((merged, merged), ("model", "mlp"), "projector", bias=True),
            "linear_1": linear_specs((merged, D), ("mlp", "model"), "projector", bias=True),
        }

    specs = merger(config.hidden_size)
    if config.deepstack_layers:
        specs["deepstack"] = {str(n): merger(merged) for n in range(len(config.deepstack_layers))}
    return specs
