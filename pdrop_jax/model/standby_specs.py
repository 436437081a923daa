"""The arrays that standby tokens add to a model, see ``standby``."""

import jax

from pdrop_jax.config import Group, LlavaConfig
from pdrop_jax.model.specs import ParamSpec, Specs, attention_specs, linear_specs, norm_specs
from pdrop_jax.model.vision_specs import projector_specs

GROUP: Group = "standby"


def standby_specs(config: LlavaConfig) -> Specs:
    """The arrays beside those of tower and projector; ``mlps`` has the tower's layers, ``temporal`` the last ones."""
    assert config.standby
    vision = config.crop_tower
    D, F, N, H = vision.hidden_size, vision.intermediate_size, vision.num_heads, vision.head_dim
    time = attention_specs(D, N, N, H, GROUP, heads=None, qkv_bias=True, output_bias=True)
    time["o"]["kernel"] = ParamSpec((N, H, D), (None, None, "model"), "zeros", GROUP, inputs=(0, 1))

    def stack(layer: Specs, layers: int) -> Specs:
        return jax.tree.map(lambda spec: spec.stacked(layers), layer)

    mlp = {
        "up": linear_specs((D, F), ("model", None), GROUP, bias=True),
        "down": linear_specs((F, D), (None, "model"), GROUP, bias=True),
    }
    return {
        "tokens": {"embedding": ParamSpec((config.standby.tokens, D), (None, None), "embedding", GROUP)},
        "mlps": stack(mlp, config.vision_layers),
        "temporal": stack({"norm": norm_specs(D, GROUP, bias=True), "attention": time}, temporal_layers(config)),
        "projector": projector_specs(vision.projector_inputs, config.text.hidden_size, config.projector_layers, GROUP),
    }


def temporal_layers(config: LlavaConfig) -> int:
    """Layers of the tower with attention over time behind them, at its end."""
    assert config.standby
    return min(config.standby.temporal_layers, config.vision_layers)


def copied_from(name: str) -> str | None:
    """The dotted name of the pretrained array that the array ``name`` begins as; None for one that is new."""
    for ours, theirs in (("standby.mlps.", "vision.layers.mlp."), ("standby.projector.", "projector.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return None
