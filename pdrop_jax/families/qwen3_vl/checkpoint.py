"""Qwen3-VL in Hugging Face's format: config.json and names of tensors, in both directions."""

import dataclasses
from typing import Any

from pydantic import Field

from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.convert.hf_parts import ACTIVATIONS, read_text, text_to_hf
from pdrop_jax.convert.hf_schema import Section, Text, one_of
from pdrop_jax.convert.names import DECODER, LINEAR, SAME, Naming, Table, dense, norm
from pdrop_jax.errors import UserError
from pdrop_jax.families.qwen2_vl import checkpoint as qwen2_vl
from pdrop_jax.families.qwen2_vl.config import LayerNumbers, QwenVisionConfig
from pdrop_jax.schema import Heads, Layers, Pixels, Width, validated

KINDS = {"qwen3_vl": "Qwen3VLForConditionalGeneration"}  # model_type -> class of transformers
# transformers' defaults for missing keys of the language model.
TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Vision(Section):
    depth: Layers = 27
    hidden_size: Width = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: Width = 4304
    num_heads: Heads = 16
    in_channels: int = 3
    patch_size: Pixels = 16
    spatial_merge_size: int = Field(default=2, ge=1, le=64)
    temporal_patch_size: int = Field(default=2, ge=1, le=64)
    out_hidden_size: Width = 3584
    num_position_embeddings: int = Field(default=2304, ge=1, le=4096**2)
    deepstack_visual_indexes: LayerNumbers = (8, 16, 24)


class Model(qwen2_vl.Model):
    """config.json; the language model is always a table of its own."""

    text_config: dict[str, Any] = Field(default_factory=dict)


class MropeRope(Section):
    mrope_section: tuple[Width, Width, Width] = (24, 20, 20)


def parts_from_hf(data: dict[str, Any], where: str) -> tuple[TextConfig, Text, dict[str, Any]]:
    """Text config, checked text section, and the other fields of the ``LlavaConfig`` that ``data`` describes.

    Raises:
      UserError: a value has the wrong type or is out of range, or something is not supported.
    """
    found = validated(Model, data, where)
    one_of("model_type", found.model_type, tuple(KINDS))
    text, special = _text_from_hf(found.text_config, bool(found.tie_word_embeddings), where)
    return text, special, qwen2_vl.fields_of(found, vision_from_hf(found.vision_config, text.hidden_size, where))


def _text_from_hf(data: dict[str, Any], tied: bool, where: str) -> tuple[TextConfig, Text]:
    """Qwen3's decoder with interleaved M-RoPE; transformers interleaves whatever the config says."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    sections = validated(MropeRope, rope, where, "text_config.rope_scaling.").mrope_section
    plain = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    given = {key: value for key, value in data.items() if key not in ("rope_parameters", "rope_scaling")}
    tied = tied or bool(data.get("tie_word_embeddings"))
    whole = {**TEXT_DEFAULTS, **given, "rope_parameters": plain, "model_type": "qwen3", "tie_word_embeddings": tied}
    text, special = read_text(whole, where, "text_config.")
    own: dict[str, Any] = {"mrope_sections": sections, "mrope_interleaved": True}
    return dataclasses.replace(text, family="qwen3_vl", **own), special


def vision_from_hf(data: dict[str, Any], width: int, where: str) -> QwenVisionConfig:
    """The tower; ``width`` is that of the decoder, which the mergers' outputs must have."""
    found = validated(Vision, data, where, "vision_config.")
    qwen2_vl.check_channels(found.in_channels, where)
    if found.out_hidden_size != width:
        raise UserError(
            f"{where}: vision_config.out_hidden_size is {found.out_hidden_size} but the language model has hidden_size "
            f"{width}"
        )
    side = int(found.num_position_embeddings**0.5)
    if side**2 != found.num_position_embeddings:
        raise UserError(
            f"{where}: vision_config.num_position_embeddings is {found.num_position_embeddings}, which is not a square"
        )
    return QwenVisionConfig(
        kind="qwen3_vl",
        patch_size=found.patch_size,
        temporal_patch_size=found.temporal_patch_size,
        merge_size=found.spatial_merge_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_layers=found.depth,
        num_heads=found.num_heads,
        activation=ACTIVATIONS[one_of("vision_config.hidden_act", found.hidden_act, tuple(ACTIVATIONS))],
        window_size=None,
        full_layers=(),
        tokens_per_second=None,
        position_side=side,
        deepstack_layers=found.deepstack_visual_indexes,
    )


def config_to_hf(config: LlavaConfig, special: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for transformers; ``special`` are the ids of BOS and EOS."""
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    text = text_to_hf(dataclasses.replace(config.text, family="qwen3"))
    sections = list(config.text.mrope_sections or ())
    rope = {"rope_type": "default", "mrope_section": sections, "mrope_interleaved": True}
    tower = vision_to_hf(vision, config.text.hidden_size)
    tables = {"text_config": text | special | {"rope_scaling": rope}, "vision_config": tower}
    return qwen2_vl.model_to_hf(config, KINDS[vision.kind], tables, dtype)


def vision_to_hf(config: QwenVisionConfig, width: int) -> dict[str, Any]:
    assert config.position_side is not None
    return {
        "model_type": f"{config.kind}_vision",
        "depth": config.num_layers,
        "hidden_size": config.hidden_size,
        "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == config.activation),
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_heads,
        "in_channels": 3,
        "patch_size": config.patch_size,
        "spatial_merge_size": config.merge_size,
        "temporal_patch_size": config.temporal_patch_size,
        "out_hidden_size": width,
        "num_position_embeddings": config.position_side**2,
        "deepstack_visual_indexes": list(config.deepstack_layers),
    }


fixed_image, torch_inputs = qwen2_vl.fixed_image, qwen2_vl.torch_inputs


@dataclasses.dataclass(frozen=True)
class Qwen3Naming(Naming):
    """Names of a whole model; ``projector`` is the merger."""

    def table(self, config: LlavaConfig) -> Table:
        vision = config.vision
        assert isinstance(vision, QwenVisionConfig)
        block = f"{self.vision}blocks.{{n}}."
        rows = {
            **dense("vision.embed.patch", f"{self.vision}patch_embed.proj"),
            **qwen2_vl.tower_rows(self.vision, vision),
            "vision.embed.position": (f"{self.vision}pos_embed.weight", SAME),
            **dense("vision.layers.mlp.up", f"{block}mlp.linear_fc1"),
            **dense("vision.layers.mlp.down", f"{block}mlp.linear_fc2"),
            "head.kernel": (self.head, LINEAR),
        }
        mergers = {"projector": self.projector}
        for n in range(len(vision.deepstack_layers)):
            mergers[f"projector.deepstack.{n}"] = f"{self.vision}deepstack_merger_list.{n}."
        for ours, theirs in mergers.items():
            rows |= norm(f"{ours}.norm", f"{theirs}norm")
            rows |= dense(f"{ours}.linear_0", f"{theirs}linear_fc1") | dense(f"{ours}.linear_1", f"{theirs}linear_fc2")
        return rows | {ours: (self.decoder + theirs, transform) for ours, (theirs, transform) in DECODER.items()}


NAMINGS: dict[str, Naming] = {
    "hf": Qwen3Naming("model.visual.", "model.language_model.", "lm_head.weight", "model.visual.merger.")
}
