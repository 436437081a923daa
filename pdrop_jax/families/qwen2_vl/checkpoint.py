"""Qwen2-VL and Qwen2.5-VL in Hugging Face's format: config.json and names of tensors, in both directions."""

import dataclasses
import math
from typing import Any

import numpy as np
from pydantic import Field

from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.convert.hf_parts import ACTIVATIONS, read_text, text_to_hf
from pdrop_jax.convert.hf_schema import Section, Text, one_of
from pdrop_jax.convert.names import DECODER, LINEAR, MERGE, Naming, Table, Transform, dense, norm
from pdrop_jax.errors import UserError
from pdrop_jax.families.qwen2_vl.config import Kind, QwenVisionConfig
from pdrop_jax.families.qwen2_vl.inputs import lay_out
from pdrop_jax.inputs.anyres import ImageTokens
from pdrop_jax.schema import Heads, Layers, Pixels, TokenId, Width, validated

KINDS: dict[Kind, str] = {  # model_type -> class of transformers
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
FIXED_GRID = 1, 12, 20  # frames, rows and columns of patches of ``fixed_image``
# transformers' defaults for missing keys of the language model.
TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


class Vision(Section):
    """The towers of both models; where a default of transformers differs it is None here."""

    depth: Layers = 32
    embed_dim: Width = 1280  # the tower's width in Qwen2-VL, whose hidden_size is the decoder's
    hidden_size: Width = 3584
    out_hidden_size: Width = 3584
    hidden_act: str | None = None
    intermediate_size: Width = 3420
    mlp_ratio: int = Field(default=4, ge=1, le=1024)
    num_heads: Heads = 16
    in_channels: int = 3
    patch_size: Pixels = 14
    spatial_merge_size: int = Field(default=2, ge=1, le=64)
    temporal_patch_size: int = Field(default=2, ge=1, le=64)
    tokens_per_second: int = Field(default=4, ge=1, le=2**14)
    window_size: Pixels = 112
    fullatt_block_indexes: list[int] = Field(default=[7, 15, 23, 31], max_length=1024)


class Model(Section):
    """config.json; the language model is a table of its own, or its keys stand beside these."""

    model_type: str
    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] = Field(default_factory=dict)
    image_token_id: TokenId = 151655
    video_token_id: TokenId = 151656
    vision_start_token_id: TokenId = 151652
    vision_end_token_id: TokenId = 151653
    tie_word_embeddings: bool | None = False


class MropeRope(Section):
    mrope_section: tuple[Width, Width, Width] = (16, 24, 24)


def parts_from_hf(data: dict[str, Any], where: str) -> tuple[TextConfig, Text, dict[str, Any]]:
    """Text config, checked text section, and the other fields of the ``LlavaConfig`` that ``data`` describes.

    Raises:
      UserError: a value has the wrong type or is out of range, or something is not supported.
    """
    found = validated(Model, data, where)
    one_of("model_type", found.model_type, tuple(KINDS))
    kind: Any = found.model_type
    prefix = "text_config." if found.text_config else ""
    text, special = _text_from_hf(found.text_config or data, kind, bool(found.tie_word_embeddings), where, prefix)
    return text, special, fields_of(found, vision_from_hf(found.vision_config, kind, text.hidden_size, where))


def fields_of(found: Model, vision: QwenVisionConfig) -> dict[str, Any]:
    """The fields of a ``LlavaConfig`` beside its decoder."""
    start, end = found.vision_start_token_id, found.vision_end_token_id
    return {
        "vision": dataclasses.replace(vision, start_token_id=start, end_token_id=end),
        "select_layer": -1,
        "image_token_id": found.image_token_id,
        "video_token_id": found.video_token_id,
    }


def _text_from_hf(data: dict[str, Any], kind: Kind, tied: bool, where: str, prefix: str) -> tuple[TextConfig, Text]:
    """Qwen2's decoder with M-RoPE."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    sections = validated(MropeRope, rope, where, prefix + "rope_scaling.").mrope_section
    plain = {key: value for key, value in rope.items() if key != "mrope_section"}
    if plain.get("rope_type", plain.get("type")) == "mrope":
        plain["rope_type"] = "default"
    given = {key: value for key, value in data.items() if key not in ("rope_parameters", "rope_scaling")}
    tied = tied or bool(data.get("tie_word_embeddings"))
    whole = {**TEXT_DEFAULTS, **given, "rope_parameters": plain, "model_type": "qwen2", "tie_word_embeddings": tied}
    text, special = read_text(whole, where, prefix)
    return dataclasses.replace(text, family=kind, mrope_sections=sections), special


def vision_from_hf(data: dict[str, Any], kind: Kind, width: int, where: str) -> QwenVisionConfig:
    """The tower; ``width`` is that of the decoder, which the merger's output must have."""
    found = validated(Vision, data, where, "vision_config.")
    check_channels(found.in_channels, where)
    windowed = kind == "qwen2_5_vl"
    key, out = ("out_hidden_size", found.out_hidden_size) if windowed else ("hidden_size", found.hidden_size)
    if out != width:
        raise UserError(f"{where}: vision_config.{key} is {out} but the language model has hidden_size {width}")
    activation = found.hidden_act or ("silu" if windowed else "quick_gelu")
    one_of("vision_config.hidden_act", activation, ("silu",) if windowed else tuple(ACTIVATIONS))
    own: dict[str, Any] = {
        "hidden_size": found.embed_dim,
        "intermediate_size": found.embed_dim * found.mlp_ratio,
        "activation": ACTIVATIONS.get(activation),
        "window_size": None,
        "full_layers": (),
        "tokens_per_second": None,
    }
    if windowed:
        own = {
            "hidden_size": found.hidden_size,
            "intermediate_size": found.intermediate_size,
            "activation": None,
            "window_size": found.window_size,
            "full_layers": tuple(sorted(found.fullatt_block_indexes)),
            "tokens_per_second": found.tokens_per_second,
        }
    return QwenVisionConfig(
        kind=kind,
        patch_size=found.patch_size,
        temporal_patch_size=found.temporal_patch_size,
        merge_size=found.spatial_merge_size,
        num_layers=found.depth,
        num_heads=found.num_heads,
        **own,
    )


def check_channels(channels: int, where: str) -> None:
    if channels != 3:
        raise UserError(f"{where}: vision_config.in_channels is {channels}: only pictures in RGB are supported")


def config_to_hf(config: LlavaConfig, special: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for transformers; ``special`` are the ids of BOS and EOS."""
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    text = text_to_hf(dataclasses.replace(config.text, family="qwen2", mrope_sections=None))
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": list(config.text.mrope_sections or ())}
    text = {key: value for key, value in text.items() if key not in ("head_dim", "attention_bias")}
    tables = {
        "text_config": text | special | {"rope_scaling": rope},
        "vision_config": vision_to_hf(vision, config.text.hidden_size),
    }
    return model_to_hf(config, KINDS[vision.kind], tables, dtype)


def model_to_hf(config: LlavaConfig, architecture: str, tables: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json around the ``tables`` of the language model and the tower."""
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    return {
        "architectures": [architecture],
        "model_type": vision.kind,
        "torch_dtype": dtype,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": vision.start_token_id,
        "vision_end_token_id": vision.end_token_id,
        "tie_word_embeddings": config.text.tie_embeddings,
        "text_config": tables["text_config"] | {"model_type": f"{vision.kind}_text", "torch_dtype": dtype},
        "vision_config": tables["vision_config"] | {"torch_dtype": dtype},
    }


def vision_to_hf(config: QwenVisionConfig, width: int) -> dict[str, Any]:
    common = {
        "model_type": f"{config.kind}_vision" if config.gated else config.kind,
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        "in_channels": 3,
        "patch_size": config.patch_size,
        "spatial_merge_size": config.merge_size,
        "temporal_patch_size": config.temporal_patch_size,
        "hidden_act": next((name for name, ours in ACTIVATIONS.items() if ours == config.activation), "silu"),
    }
    if not config.gated:
        ratio = config.intermediate_size // config.hidden_size
        return common | {"embed_dim": config.hidden_size, "hidden_size": width, "mlp_ratio": ratio}
    return common | {
        "hidden_size": config.hidden_size,
        "out_hidden_size": width,
        "intermediate_size": config.intermediate_size,
        "window_size": config.window_size,
        "fullatt_block_indexes": list(config.full_layers),
        "tokens_per_second": config.tokens_per_second,
    }


def tower_rows(tower: str, config: QwenVisionConfig) -> Table:
    """Names of the arrays that all of Qwen's towers have, behind the prefix ``tower``."""
    block = f"{tower}blocks.{{n}}."
    return {
        "vision.embed.patch.kernel": (f"{tower}patch_embed.proj.weight", patches(config)),
        **norm("vision.layers.attention_norm", f"{block}norm1"),
        **dense("vision.layers.attention.qkv", f"{block}attn.qkv"),
        **dense("vision.layers.attention.o", f"{block}attn.proj", MERGE),
        **norm("vision.layers.mlp_norm", f"{block}norm2"),
    }


def fixed_image(config: LlavaConfig) -> ImageTokens:
    """A picture by which a converted model is compared with PyTorch's: its patches all differ."""
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    return lay_out(_waves(vision), FIXED_GRID, vision)


def torch_inputs(config: LlavaConfig, image: ImageTokens, shown: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers' class takes beside the ids for ``fixed_image``; ``shown`` (1, n) is 1 at its tokens."""
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    return {"pixel_values": _waves(vision), "image_grid_thw": np.array([FIXED_GRID]), "mm_token_type_ids": shown}


def _waves(config: QwenVisionConfig) -> np.ndarray:
    """(n, F) float32, the patches of ``fixed_image``."""
    n = np.arange(math.prod(FIXED_GRID), dtype=np.float32)[:, None]
    return np.sin(n * 0.7 + np.arange(config.patch_values, dtype=np.float32) * (n + 1) * 0.01)


@dataclasses.dataclass(frozen=True)
class QwenNaming(Naming):
    """Names of a whole model; ``projector`` is the merger."""

    def table(self, config: LlavaConfig) -> Table:
        vision = config.vision
        assert isinstance(vision, QwenVisionConfig)
        mlp = (
            {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
            if vision.gated
            else {"up": "fc1", "down": "fc2"}
        )
        block = f"{self.vision}blocks.{{n}}."
        rows = {
            **tower_rows(self.vision, vision),
            **norm("projector.norm", f"{self.projector}ln_q"),
            **dense("projector.linear_0", f"{self.projector}mlp.0"),
            **dense("projector.linear_1", f"{self.projector}mlp.2"),
            "head.kernel": (self.head, LINEAR),
        }
        for ours, theirs in mlp.items():
            rows |= dense(f"vision.layers.mlp.{ours}", f"{block}mlp.{theirs}")
        return rows | {ours: (self.decoder + theirs, transform) for ours, (theirs, transform) in DECODER.items()}


def patches(config: QwenVisionConfig) -> Transform:
    """(F, D) <-> the kernel of a convolution (D, 3, frames, rows, columns)."""
    side = config.patch_size
    patch = 3, config.temporal_patch_size, side, side
    return Transform(
        lambda shape: (shape[1], *patch),
        lambda x, shape: x.reshape(shape[1], math.prod(patch)).T,
        lambda x: x.T.reshape(x.shape[1], *patch),
    )


NAMINGS: dict[str, Naming] = {
    "hf": QwenNaming("visual.", "model.", "lm_head.weight", "visual.merger."),  # of the hub, as transformers 5 saves
    "hf-modules": QwenNaming(  # names of the modules since transformers 4.52
        "model.visual.", "model.language_model.", "lm_head.weight", "model.visual.merger."
    ),
}
