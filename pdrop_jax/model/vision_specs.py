"""The arrays of a vision tower that takes square crops, CLIP or SigLIP, and of LLaVA's projector."""

from pdrop_jax.config import LlavaConfig, VisionConfig
from pdrop_jax.model.specs import ParamSpec, Specs, attention_specs, linear_specs, norm_specs


def vision_layer_specs(config: VisionConfig) -> Specs:
    D, N, H, F = config.hidden_size, config.num_heads, config.head_dim, config.intermediate_size
    return {
        "attention_norm": norm_specs(D, "vision", bias=True),
        "attention": attention_specs(D, N, N, H, "vision", heads=None, qkv_bias=True, output_bias=True),
        "mlp_norm": norm_specs(D, "vision", bias=True),
        "mlp": {
            "up": linear_specs((D, F), ("model", None), "vision", bias=True),
            "down": linear_specs((F, D), (None, "model"), "vision", bias=True),
        },
    }


def vision_embedding_specs(config: VisionConfig) -> Specs:
    D, P, clip = config.hidden_size, config.patch_size, config.kind == "clip"
    slots = config.class_tokens + config.num_patches
    specs = {
        "patch": linear_specs((P, P, 3, D), (None, None, None, "model"), "vision", inputs=(0, 1, 2), bias=not clip),
        "position": ParamSpec((slots, D), (None, "model"), "embedding", "vision"),
    }
    if clip:
        specs["class_token"] = ParamSpec((D,), (None,), "embedding", "vision")
        specs["norm"] = norm_specs(D, "vision", bias=True)
    return specs


def crop_tower_specs(config: LlavaConfig) -> Specs:
    """The arrays of tower and projector; those of a layer of the tower are declared once, as "layer"."""
    vision = config.crop_tower
    return {
        "vision": {"embed": vision_embedding_specs(vision), "layer": vision_layer_specs(vision)},
        "projector": projector_specs(vision.hidden_size, config.text.hidden_size, config.projector_layers),
    }


def projector_specs(vision_size: int, D: int, num_layers: int) -> Specs:
    """Layers alternate between the two ways to shard a matrix, so that what one leaves sharded the next sums over."""

    def layer(n: int) -> Specs:
        axes = ("mlp", "model") if n % 2 else ("model", "mlp")
        return linear_specs((D if n else vision_size, D), axes, "projector", bias=True)

    return {f"linear_{n}": layer(n) for n in range(num_layers)}
