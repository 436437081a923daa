"""Gemma 3 in Hugging Face's format: config.json and names of tensors, in both directions."""

import dataclasses
import math
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.convert.hf_parts import rope_scaling_from_hf, rope_scaling_to_hf, vision_from_hf, vision_to_hf
from pdrop_jax.convert.hf_schema import Rope, Section, one_of
from pdrop_jax.convert.names import DECODER, LINEAR, SAME, VISION, Naming, Table, norm
from pdrop_jax.convert.waves import one_crop
from pdrop_jax.errors import UserError
from pdrop_jax.families.gemma3.config import GemmaVisionConfig
from pdrop_jax.inputs.anyres import ImageTokens
from pdrop_jax.schema import (
    Heads,
    Layers,
    NormEps,
    Positions,
    Positive,
    RopeBase,
    TokenId,
    Vocabulary,
    Width,
    validated,
)

KINDS = {"gemma3": "Gemma3ForConditionalGeneration"}  # model_type -> class of transformers
TokenIds = TokenId | Annotated[list[TokenId], Field(max_length=64)]


class Text(Section):
    """The language model, with transformers' defaults."""

    model_type: str = "gemma3_text"
    vocab_size: Vocabulary = 262208
    hidden_size: Width = 2304
    intermediate_size: Width = 9216
    num_hidden_layers: Layers = 26
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads = 4
    head_dim: Width = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: Positions = 131072
    rms_norm_eps: NormEps = 1e-6
    rope_theta: RopeBase = 1e6
    rope_local_base_freq: RopeBase = 1e4
    rope_scaling: Rope | None = None
    rope_parameters: dict[str, Rope | None] | None = None
    tie_word_embeddings: bool | None = True
    attention_bias: bool | None = False
    query_pre_attn_scalar: Width = 256
    sliding_window: Positions = 4096
    sliding_window_pattern: Annotated[int, Field(ge=1, le=1024)] = 6
    layer_types: Annotated[list[str], Field(max_length=1024)] | None = None
    final_logit_softcapping: Positive | None = None
    attn_logit_softcapping: Positive | None = None
    use_bidirectional_attention: bool | None = False
    bos_token_id: TokenId | None = 2
    eos_token_id: TokenIds | None = 1


class Model(Section):
    """config.json."""

    model_type: str
    text_config: dict[str, Any] = Field(default_factory=dict)
    vision_config: dict[str, Any] = Field(default_factory=dict)
    mm_tokens_per_image: Annotated[int, Field(ge=1, le=2**16)] = 256
    boi_token_index: TokenId = 255999
    eoi_token_index: TokenId = 256000
    image_token_index: TokenId | None = None
    image_token_id: TokenId | None = None
    tie_word_embeddings: bool | None = True
    eos_token_id: TokenIds | None = None


def parts_from_hf(data: dict[str, Any], where: str) -> tuple[TextConfig, Text, dict[str, Any]]:
    """Text config, checked text section, and the other fields of the ``LlavaConfig`` that ``data`` describes.

    Raises:
      UserError: a value has the wrong type or is out of range, or something is not supported.
    """
    found = validated(Model, data, where)
    one_of("model_type", found.model_type, tuple(KINDS))
    given = dict(found.text_config)
    if found.eos_token_id is not None:
        given.setdefault("eos_token_id", found.eos_token_id)
    special = validated(Text, given, where, "text_config.")
    tied = bool(found.tie_word_embeddings and special.tie_word_embeddings)
    text = _text_from_hf(special, tied, where)
    side = math.isqrt(found.mm_tokens_per_image)
    if side**2 != found.mm_tokens_per_image:
        raise UserError(f"{where}: mm_tokens_per_image is {found.mm_tokens_per_image}, which is no square of tokens")
    tower = vision_from_hf({"model_type": "siglip_vision_model"} | found.vision_config, where, "vision_config.")
    one_of("vision model_type", tower.kind, ("siglip",))
    if tower.pooling_head:
        raise UserError(f"{where}: vision_config.vision_use_head is not supported for gemma3, whose towers have none")
    vision = GemmaVisionConfig(
        **dataclasses.asdict(tower),
        tokens_a_side=side,
        start_token_id=found.boi_token_index,
        end_token_id=found.eoi_token_index,
    )
    image = found.image_token_index if found.image_token_id is None else found.image_token_id
    fields = {"vision": vision, "select_layer": -1, "projector_layers": 1}
    return text, special, fields | {"image_token_id": 262144 if image is None else image}


def _text_from_hf(found: Text, tied: bool, where: str) -> TextConfig:
    one_of("language model_type", found.model_type, ("gemma3_text",))
    one_of("hidden_activation", found.hidden_activation, ("gelu_pytorch_tanh",))
    for key in ("attention_bias", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(found, key):
            raise UserError(f"{where}: text_config.{key} {getattr(found, key)} is not supported: Gemma 3 has none")
    ropes = found.rope_parameters or {}
    full, local = ropes.get("full_attention"), ropes.get("sliding_attention")
    one_of("rope of the sliding layers", (local and (local.rope_type or local.type)) or "default", ("default",))
    kinds = found.layer_types or [
        "full_attention" if (n + 1) % found.sliding_window_pattern == 0 else "sliding_attention"
        for n in range(found.num_hidden_layers)
    ]
    for kind in kinds:
        one_of("layer type", kind, ("full_attention", "sliding_attention"))
    if len(kinds) != found.num_hidden_layers:
        raise UserError(f"{where}: layer_types names {len(kinds)} layers of {found.num_hidden_layers}")
    return TextConfig(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_layers=found.num_hidden_layers,
        num_heads=found.num_attention_heads,
        num_kv_heads=found.num_key_value_heads,
        head_dim=found.head_dim,
        rope_theta=(full and full.rope_theta) or found.rope_theta,
        rope_scaling=rope_scaling_from_hf(full or found.rope_scaling, where),
        norm_eps=found.rms_norm_eps,
        tie_embeddings=tied,
        max_length=found.max_position_embeddings,
        family="gemma3",
        sliding_window=found.sliding_window,
        qk_norm=True,
        norm_plus_one=True,
        post_norms=True,
        activation="gelu_tanh",
        scaled_embeddings=True,
        query_scalar=found.query_pre_attn_scalar,
        full_layers=tuple(n for n, kind in enumerate(kinds) if kind == "full_attention"),
        local_rope_theta=(local and local.rope_theta) or found.rope_local_base_freq,
        two_way_images=True,
    )


def config_to_hf(config: LlavaConfig, special: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for transformers; ``special`` are the ids of BOS and EOS."""
    vision, text = config.vision, config.text
    assert isinstance(vision, GemmaVisionConfig)
    scaling = text.rope_scaling
    return {
        "architectures": [KINDS["gemma3"]],
        "model_type": "gemma3",
        "torch_dtype": dtype,
        "mm_tokens_per_image": vision.tokens_a_side**2,
        "boi_token_index": vision.start_token_id,
        "eoi_token_index": vision.end_token_id,
        "image_token_index": config.image_token_id,
        "tie_word_embeddings": text.tie_embeddings,
        **{key: value for key, value in special.items() if key == "eos_token_id"},
        "text_config": special
        | {
            "model_type": "gemma3_text",
            "torch_dtype": dtype,
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": text.max_length,
            "rms_norm_eps": text.norm_eps,
            "rope_theta": text.rope_theta,
            "rope_local_base_freq": text.local_rope_theta,
            "rope_scaling": rope_scaling_to_hf(scaling) if scaling else None,
            "tie_word_embeddings": text.tie_embeddings,
            "query_pre_attn_scalar": text.query_scalar or text.head_dim,
            "sliding_window": text.sliding_window,
            "layer_types": [
                "full_attention" if n in text.full_layers else "sliding_attention" for n in range(text.num_layers)
            ],
        },
        "vision_config": vision_to_hf(vision) | {"torch_dtype": dtype},
    }


fixed_image = one_crop


def torch_inputs(config: LlavaConfig, image: ImageTokens, shown: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers' class takes beside the ids for ``fixed_image``; ``shown`` (1, n) is 1 at its tokens."""
    return {"pixel_values": image.crops.transpose(0, 3, 1, 2).copy(), "token_type_ids": shown}


@dataclasses.dataclass(frozen=True)
class GemmaNaming(Naming):
    """Names of a whole model."""

    def table(self, config: LlavaConfig) -> Table:
        rows = {f"vision.{ours}": (self.vision + theirs, transform) for ours, (theirs, transform) in VISION.items()}
        rows |= norm("vision.norm", f"{self.vision}post_layernorm")
        rows |= norm("projector.norm", f"{self.projector}mm_soft_emb_norm")
        rows["projector.linear_0.kernel"] = f"{self.projector}mm_input_projection_weight", SAME
        rows |= {ours: (self.decoder + theirs, transform) for ours, (theirs, transform) in DECODER.items()}
        norms = {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
        for ours, theirs in norms.items():
            rows |= norm(f"stages.{ours}", f"{self.decoder}layers.{{n}}.{theirs}")
        return rows | {"head.kernel": (self.head, LINEAR)}


_HF = GemmaNaming(
    "vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.weight", "multi_modal_projector."
)
_MODULES = GemmaNaming("model.vision_tower.", "model.language_model.", "lm_head.weight", "model.multi_modal_projector.")
NAMINGS: dict[str, Naming] = {
    "hf": _HF,  # of the hub
    "hf-5": dataclasses.replace(_HF, vision="vision_tower."),  # as transformers 5 saves
    "hf-modules": dataclasses.replace(_MODULES, vision="model.vision_tower.vision_model."),  # since transformers 4.52
    "hf-5-modules": _MODULES,
}
