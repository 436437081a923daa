"""The arrays of a vision tower that takes square crops, such as CLIP, and of LLaVA's projector."""

from pdrop_jax.config import Group, LlavaConfig, VisionConfig
from pdrop_jax.model.specs import ParamSpec, Specs, attention_specs, linear_specs, norm_specs


def vision_layer_specs(config: VisionConfig) -> Specs:
    D, N, H, F = config.hidden_size, config.num_heads, config.head_dim, config.intermediate_size
    attention = attention_specs(D, N, N, H, "vision", heads=None, qkv_bias=config.qkv_bias, output_bias=True)
    if config.qk_norm:
        attention |= {name: norm_specs(D, "vision") for name in ("q_norm", "k_norm")}
    specs = {
        "attention_norm": norm_specs(D, "vision", bias=not config.rms_norm),
        "attention": attention,
        "mlp_norm": norm_specs(D, "vision", bias=not config.rms_norm),
        "mlp": {
            "up": linear_specs((D, F), ("model", None), "vision", bias=True),
            "down": linear_specs((F, D), (None, "model"), "vision", bias=True),
        },
    }
    if config.layer_scale:
        specs |= {name: norm_specs(D, "vision") for name in ("attention_scale", "mlp_scale")}
    return specs


def vision_embedding_specs(config: VisionConfig) -> Specs:
    D, P, clip = config.hidden_size, config.patch_size, config.kind == "clip"
    slots = config.class_tokens + config.num_patches
    specs = {
        "patch": linear_specs((P, P, 3, D), (None, None, None, "model"), "vision", inputs=(0, 1, 2), bias=not clip),
        "position": ParamSpec((slots, D), (None, "model"), "embedding", "vision"),
    }
    if config.class_tokens:
        specs["class_token"] = ParamSpec((D,), (None,), "embedding", "vision")
    if clip:
        specs["norm"] = norm_specs(D, "vision", bias=True)
    return specs


def crop_tower_specs(config: LlavaConfig) -> Specs:
    """The arrays of tower and projector; those of a layer of the tower are declared once, as "layer"."""
    vision = config.crop_tower
    return {
        "vision": {"embed": vision_embedding_specs(vision), "layer": vision_layer_specs(vision)},
        "projector": projector_specs(vision.projector_inputs, config.text.hidden_size, config.projector_layers),
    }


def projector_specs(vision_size: int, D: int, num_layers: int, group: Group = "projector") -> Specs:
    """Layers alternate between the two ways to shard a matrix, so that what one leaves sharded the next sums over."""

    def layer(n: int) -> Specs:
        axes = ("mlp", "model") if n % 2 else ("model", "mlp")
        return linear_specs((D if n else vision_size, D), axes, group, bias=True)

    return {f"linear_{n}": layer(n) for n in range(num_layers)}
