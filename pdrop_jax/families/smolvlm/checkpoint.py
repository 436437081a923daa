"""SmolVLM2 and Idefics3 in Hugging Face's format: config.json and names of tensors, in both directions."""

import dataclasses
from typing import Any

import numpy as np
from pydantic import Field

from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.convert.hf_parts import ACTIVATIONS, text_to_hf
from pdrop_jax.convert.hf_schema import Section, Text, one_of
from pdrop_jax.convert.names import DECODER, LINEAR, VISION, Naming, Table, norm
from pdrop_jax.convert.waves import one_crop
from pdrop_jax.errors import UserError
from pdrop_jax.families.internvl.checkpoint import Sides, side_of, text_from_hf
from pdrop_jax.families.internvl.config import TiledVisionConfig
from pdrop_jax.inputs.anyres import ImageTokens
from pdrop_jax.schema import Heads, Layers, NormEps, TokenId, Width, validated

KINDS = {  # model_type -> class of transformers
    "smolvlm": "SmolVLMForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
}


class Vision(Section):
    """The tower, with transformers' defaults."""

    hidden_size: Width = 1152
    intermediate_size: Width = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 16
    num_channels: int = 3
    image_size: Sides = 224
    patch_size: Sides = 32
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: NormEps = 1e-6


class Model(Section):
    """config.json."""

    model_type: str
    text_config: dict[str, Any] = Field(default_factory=dict)
    vision_config: dict[str, Any] = Field(default_factory=dict)
    image_token_id: TokenId = 128257
    scale_factor: int = Field(default=2, ge=1, le=64)
    tie_word_embeddings: bool | None = None


def parts_from_hf(data: dict[str, Any], where: str) -> tuple[TextConfig, Text, dict[str, Any]]:
    """Text config, checked text section, and the other fields of the ``LlavaConfig`` that ``data`` describes.

    Raises:
      UserError: a value has the wrong type or is out of range, or something is not supported.
    """
    found = validated(Model, data, where)
    kind: Any = one_of("model_type", found.model_type, tuple(KINDS))
    given = {"rms_norm_eps": 1e-5, **found.text_config}
    text, special = text_from_hf(given, found.tie_word_embeddings, ("llama",), where)
    tower = validated(Vision, found.vision_config, where, "vision_config.")
    if tower.num_channels != 3:
        raise UserError(f"{where}: vision_config.num_channels {tower.num_channels} is not supported, expected 3")
    vision = TiledVisionConfig(
        kind=kind,
        image_size=side_of(tower.image_size, "image_size", where),
        patch_size=side_of(tower.patch_size, "patch_size", where),
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_layers=tower.num_hidden_layers,
        num_heads=tower.num_attention_heads,
        norm_eps=tower.layer_norm_eps,
        activation=ACTIVATIONS[one_of("vision_config.hidden_act", tower.hidden_act, tuple(ACTIVATIONS))],
        layer_scale=False,
        merge_size=found.scale_factor,
    )
    fields = {"vision": vision, "select_layer": -1, "projector_layers": 1, "image_token_id": found.image_token_id}
    return dataclasses.replace(text, family=kind), special, fields


def config_to_hf(config: LlavaConfig, special: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for transformers; ``special`` are the ids of BOS and EOS."""
    vision = config.vision
    assert isinstance(vision, TiledVisionConfig)
    text = text_to_hf(dataclasses.replace(config.text, family="llama")) | special
    return {
        "architectures": [KINDS[vision.kind]],
        "model_type": vision.kind,
        "torch_dtype": dtype,
        "image_token_id": config.image_token_id,
        "scale_factor": vision.merge_size,
        "tie_word_embeddings": config.text.tie_embeddings,
        "text_config": text | {"torch_dtype": dtype},
        "vision_config": {
            "model_type": f"{vision.kind}_vision",
            "torch_dtype": dtype,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == vision.activation),
            "layer_norm_eps": vision.norm_eps,
        },
    }


fixed_image = one_crop


def torch_inputs(config: LlavaConfig, image: ImageTokens, shown: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers' class takes beside the ids for ``fixed_image``; ``shown`` (1, n) is 1 at its tokens."""
    return {"pixel_values": image.crops.transpose(0, 3, 1, 2)[None].copy()}


@dataclasses.dataclass(frozen=True)
class SmolNaming(Naming):
    """Names of a whole model."""

    def table(self, config: LlavaConfig) -> Table:
        rows = {f"vision.{ours}": (self.vision + theirs, transform) for ours, (theirs, transform) in VISION.items()}
        rows |= norm("vision.norm", f"{self.vision}post_layernorm")
        rows |= {ours: (self.decoder + theirs, transform) for ours, (theirs, transform) in DECODER.items()}
        return rows | {"projector.linear_0.kernel": (self.projector, LINEAR), "head.kernel": (self.head, LINEAR)}


NAMINGS: dict[str, Naming] = {
    "hf": SmolNaming(
        "model.vision_model.", "model.text_model.", "lm_head.weight", "model.connector.modality_projection.proj.weight"
    )
}
