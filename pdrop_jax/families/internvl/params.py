"""The arrays of InternVL beside those of its tower's layers: a projector that begins with a norm."""

from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.specs import Specs, norm_specs
from pdrop_jax.model.vision_specs import crop_tower_specs


def specs(config: LlavaConfig) -> Specs:
    found = crop_tower_specs(config)
    norm = norm_specs(config.crop_tower.projector_inputs, "projector", bias=True)
    return {**found, "projector": {"norm": norm, **found["projector"]}}
