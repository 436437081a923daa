"""The arrays of Gemma 3 beside SigLIP's: the tower's last norm, and the projector."""

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.specs import Specs, linear_specs, norm_specs
from pdrop_jax.model.vision_specs import crop_tower_specs


def specs(config: LlavaConfig) -> Specs:
    width = config.vision.hidden_size
    return {
        "vision": {**crop_tower_specs(config)["vision"], "norm": norm_specs(width, "vision", bias=True)},
        "projector": {
            "norm": norm_specs(width, "projector", plus_one=True),
            "linear_0": linear_specs((width, config.text.hidden_size), ("model", "mlp"), "projector"),
        },
    }
