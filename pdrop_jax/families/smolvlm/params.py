"""The arrays of SmolVLM: SigLIP's with its last norm, and a projector of one matrix."""

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.specs import Specs, linear_specs, norm_specs
from pdrop_jax.model.vision_specs import crop_tower_specs


def specs(config: LlavaConfig) -> Specs:
    vision = config.crop_tower
    shape = (vision.projector_inputs, config.text.hidden_size)
    return {
        "vision": {**crop_tower_specs(config)["vision"], "norm": norm_specs(vision.hidden_size, "vision", bias=True)},
        "projector": {"linear_0": linear_specs(shape, ("model", "mlp"), "projector")},
    }
