"""The arrays of Gemma 3 behind SigLIP's layers: the tower's last norm, and the projector."""

from pdrop_jax.families.gemma3.config import GemmaVisionConfig
from pdrop_jax.model.specs import Specs, linear_specs, norm_specs


def last_norm_specs(config: GemmaVisionConfig) -> Specs:
    return norm_specs(config.hidden_size, "vision", bias=True)


def projector_specs(config: GemmaVisionConfig, D: int) -> Specs:
    return {
        "norm": norm_specs(config.hidden_size, "projector", plus_one=True),
        "linear_0": linear_specs((config.hidden_size, D), ("model", "mlp"), "projector"),
    }
