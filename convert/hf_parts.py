"""Vision tower and language model: Hugging Face's config to ours, and back."""

import re
from typing import Any, Literal

from pdrop_jax.config import MAX_TILES, Activation, Family, LlavaConfig, RopeScaling, TextConfig, Tiling, VisionConfig
from pdrop_jax.convert.hf_schema import Resolutions, Rope, Text, Vision, one_of
from pdrop_jax.errors import UserError
from pdrop_jax.schema import validated

# transformers' defaults for missing keys, where the families differ.
FAMILIES: dict[Family, dict[str, Any]] = {
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
# model_type of the original LLaVA code, whose config.json contains the language model's keys beside its own.
# The last one is that of its forks: such checkpoints are read, but not written.
ORIGINAL_TYPES: dict[Family, str] = {
    "llama": "llava_llama",
    "mistral": "llava_mistral",
    "qwen2": "llava_qwen",
    "qwen3": "llava_qwen3",
}

ACTIVATIONS: dict[str, Activation] = {  # Hugging Face's name -> ours
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def vision_from_hf(data: dict[str, Any], where: str = "config.json", prefix: str = "") -> VisionConfig:
    """The vision tower that a config describes; missing keys have transformers' defaults.

    Args:
      data: the config of a vision model, or of a whole CLIP or SigLIP that contains one.
      where: how error messages refer to the file.
      prefix: prefix of the keys in error messages, for a table inside the file.

    Raises:
      UserError: a value has the wrong type or is out of range, or something is not supported.
    """
    found = validated(Vision, data, where, prefix)
    known = ("clip_vision_model", "siglip_vision_model", "clip", "siglip")
    kind = one_of("vision model_type", found.model_type, known)
    if not kind.endswith("_vision_model"):
        prefix += "vision_config."
        found = validated(Vision, found.vision_config or {}, where, prefix)
    siglip = kind.startswith("siglip")
    activation = found.hidden_act or ("gelu_pytorch_tanh" if siglip else "quick_gelu")
    norm_eps = found.layer_norm_eps
    return VisionConfig(
        image_size=found.image_size,
        patch_size=found.patch_size or (16 if siglip else 32),
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_layers=found.num_hidden_layers,
        num_heads=found.num_attention_heads,
        norm_eps=(1e-6 if siglip else 1e-5) if norm_eps is None else norm_eps,
        activation=ACTIVATIONS[one_of("hidden_act", activation, tuple(ACTIVATIONS))],
        kind="siglip" if siglip else "clip",
        pooling_head=siglip and found.vision_use_head,
    )


def vision_to_hf(config: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": f"{config.kind}_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        **({"vision_use_head": config.pooling_head} if config.kind == "siglip" else {}),
    }


def text_from_hf(data: dict[str, Any], where: str = "config.json", prefix: str = "") -> TextConfig:
    """The decoder that a config describes; missing keys have transformers' defaults.

    Args:
      data: the config of a language model, or of an original LLaVA.
      where: how error messages refer to the file.
      prefix: prefix of the keys in error messages, for a table inside the file.

    Raises:
      UserError: a value has the wrong type or is out of range, or something is not supported.
    """
    return read_text(data, where, prefix)[0]


def read_text(data: dict[str, Any], where: str, prefix: str = "") -> tuple[TextConfig, Text]:
    """``text_from_hf`` with the checked config beside it, which has the special tokens too."""
    kind = data.get("model_type", "llama")
    kind = next((name for name, original in ORIGINAL_TYPES.items() if kind == original), kind)
    family: Family = one_of("language model_type", kind, tuple(FAMILIES))
    found = validated(Text, {**FAMILIES[family], **data, "model_type": family}, where, prefix)
    one_of("hidden_act", found.hidden_act, ("silu",))
    if found.mlp_bias:
        raise UserError("mlp_bias is not supported: LLaMA-family models of LLaVA have none")
    rope, scaling = found.rope_parameters, found.rope_parameters or found.rope_scaling
    bias = family in ("llama", "qwen3") and bool(found.attention_bias)
    text = TextConfig(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_layers=found.num_hidden_layers,
        num_heads=found.num_attention_heads,
        num_kv_heads=found.num_key_value_heads or found.num_attention_heads,
        head_dim=found.head_dim or max(1, found.hidden_size // found.num_attention_heads),
        rope_theta=found.rope_theta if rope is None or rope.rope_theta is None else rope.rope_theta,
        rope_scaling=rope_scaling_from_hf(scaling, where),
        norm_eps=found.rms_norm_eps,
        tie_embeddings=bool(found.tie_word_embeddings),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        max_length=found.max_position_embeddings,
        family=family,
        sliding_window=_sliding_window(family, found),
        qk_norm=family == "qwen3",
    )
    return text, found


def text_to_hf(config: TextConfig) -> dict[str, Any]:
    """Raises UserError if transformers' class of the family cannot express it."""
    biases = {"llama": config.qkv_bias == config.output_bias, "mistral": not (config.qkv_bias or config.output_bias)}
    biases |= {"qwen2": config.qkv_bias and not config.output_bias, "qwen3": biases["llama"]}
    own_norm = config.qk_norm == (config.family == "qwen3")
    if not biases[config.family] or not own_norm or (config.family == "llama" and config.sliding_window):
        raise UserError(
            f"a {config.family} model with q/k/v bias {config.qkv_bias}, output bias {config.output_bias}, q/k norm "
            f"{config.qk_norm} and sliding window {config.sliding_window} cannot be exported: transformers has none"
        )
    own: dict[str, Any] = {"attention_bias": config.qkv_bias} if config.family in ("llama", "qwen3") else {}
    if config.family != "llama":
        own["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
        own |= {
            "use_sliding_window": config.sliding_window is not None,
            "max_window_layers": config.num_layers if config.sliding_window is None else 0,
        }
    return {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling_to_hf(config.rope_scaling) if config.rope_scaling else None,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
        **own,
    }


def rope_scaling_from_hf(found: Rope | None, where: str = "config.json") -> RopeScaling | None:
    """Raises UserError for a kind that is not supported, or one without its factor."""
    kind = "default" if found is None else found.rope_type or found.type or "default"
    if found is None or kind == "default":
        return None
    known: tuple[Literal["linear", "llama3", "dynamic"], ...] = ("linear", "llama3", "dynamic")
    one_of("rope scaling", kind, known)
    if found.factor is None:
        raise UserError(f"{where} has no factor for its {kind} rope scaling")
    return RopeScaling(
        kind=known[known.index(kind)],
        factor=found.factor,
        low_freq_factor=found.low_freq_factor,
        high_freq_factor=found.high_freq_factor,
        original_max_length=found.original_max_position_embeddings,
    )


def rope_scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind != "llama3":
        return {"rope_type": scaling.kind, "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }


def _sliding_window(family: Family, found: Text) -> int | None:
    """The window of every layer: Mistral's is on unless it is null, Qwen's is switched on and may spare layers."""
    window, num_layers = found.sliding_window, found.num_hidden_layers
    if family == "mistral":
        return window
    if family == "llama" or window is None or not found.use_sliding_window:
        return None
    full = num_layers if found.max_window_layers is None else min(found.max_window_layers, num_layers)
    types = found.layer_types or ["full_attention"] * full + ["sliding_attention"] * (num_layers - full)
    if len(set(types)) > 1:
        raise UserError(
            f"max_window_layers is {full} of {num_layers} layers: a sliding window in some layers only is not supported"
        )
    return window if types[0] == "sliding_attention" else None


def special_tokens(config: LlavaConfig) -> dict[str, Any]:
    eos = config.eos_token_ids
    return {"bos_token_id": config.bos_token_id, "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None}


def tiling_from_hf(points: Any, order: list[int], *, rounded: bool) -> Tiling:
    """``order`` is the position of height and width in a resolution."""
    try:
        found = validated(Resolutions, points or [], "image_grid_pinpoints")
    except UserError:
        raise UserError(
            f"image_grid_pinpoints {str(points)[:60]!r} is not a list of resolutions [a, b] in pixels"
        ) from None
    return Tiling(tuple((point[order[0]], point[order[1]]) for point in found), rounded=rounded)


def max_tiles_from_hf(key: str, value: str) -> int:
    """N of anyres_max_N. Raises UserError if the value of ``key`` is something else."""
    found = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", value)
    if not found or int(found[1]) > MAX_TILES:
        raise UserError(f"{key} {value!r} is not supported, expected anyres_max_9 (up to {MAX_TILES})")
    return int(found[1])
