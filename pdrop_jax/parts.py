"""The two parts of a LLaVA, a vision tower and a language model: frozen configs, to and from Hugging Face's."""

import dataclasses
from typing import Any, Literal

from pdrop_jax.errors import UserError

Family = Literal["llama", "mistral", "qwen2"]

# What transformers takes for the keys that a config of a family leaves out, where the families differ.
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
}
# model_type of the original LLaVA code, whose config.json holds the language model's keys beside its own.
ORIGINAL_TYPES: dict[Family, str] = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {  # Hugging Face's name -> ours
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP vision transformer. The defaults are CLIP's ViT-L/14 at 336 pixels, LLaVA-1.5's tower."""

    image_size: int = 336  # pixels
    patch_size: int = 14  # pixels
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"
    kind: Literal["clip", "siglip"] = "clip"
    pooling_head: bool = False  # SigLIP's: it never runs in a LLaVA, but a checkpoint may hold it

    @property
    def patches_a_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_a_side**2

    @property
    def class_tokens(self) -> int:
        """Tokens in front of the patches: CLIP has one, SigLIP none."""
        return 1 if self.kind == "clip" else 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_hf(cls, data: dict[str, Any]) -> "VisionConfig":
        """From a vision model's config, or that of its whole CLIP; keys left out have transformers' defaults."""
        known = ("clip_vision_model", "siglip_vision_model", "clip", "siglip")
        kind = one_of("vision model_type", data.get("model_type", "clip_vision_model"), known)
        if not kind.endswith("_vision_model"):
            data = data.get("vision_config") or {}
        siglip = kind.startswith("siglip")
        activation = data.get("hidden_act", "gelu_pytorch_tanh" if siglip else "quick_gelu")
        return cls(
            image_size=data.get("image_size", 224),
            patch_size=data.get("patch_size", 16 if siglip else 32),
            hidden_size=data.get("hidden_size", 768),
            intermediate_size=data.get("intermediate_size", 3072),
            num_layers=data.get("num_hidden_layers", 12),
            num_heads=data.get("num_attention_heads", 12),
            norm_eps=data.get("layer_norm_eps", 1e-6 if siglip else 1e-5),
            activation=ACTIVATIONS[one_of("hidden_act", activation, tuple(ACTIVATIONS))],
            kind="siglip" if siglip else "clip",
            pooling_head=siglip and data.get("vision_use_head", True),
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "model_type": f"{self.kind}_vision_model",
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == self.activation),
            **({"vision_use_head": self.pooling_head} if self.kind == "siglip" else {}),
        }


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies, as in transformers: ``linear`` or ``llama3``."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    @classmethod
    def from_hf(cls, data: dict[str, Any] | None) -> "RopeScaling | None":
        kind = (data or {}).get("rope_type", (data or {}).get("type", "default"))
        if data is None or kind == "default":
            return None
        return cls(
            kind=one_of("rope scaling", kind, ("linear", "llama3")),
            factor=float(data["factor"]),
            low_freq_factor=float(data.get("low_freq_factor", 1.0)),
            high_freq_factor=float(data.get("high_freq_factor", 4.0)),
            original_max_length=int(data.get("original_max_position_embeddings", 8192)),
        )

    def to_hf(self) -> dict[str, Any]:
        if self.kind == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_length,
        }


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A decoder of the LLaMA, Mistral or Qwen2 family. The defaults are LLaMA-2-7B, LLaVA-1.5-7B's language model."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention's output projection
    max_length: int = 4096  # positions
    family: Family = "llama"  # which class of transformers it is; what runs is told by the other fields
    sliding_window: int | None = None  # keys that a query sees, itself included; None is all before it

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads: not a multiple"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"sliding_window is {self.sliding_window}: a token sees at least itself")

    @classmethod
    def from_hf(cls, data: dict[str, Any]) -> "TextConfig":
        """From the config of a language model, or an original LLaVA's; keys left out have transformers' defaults."""
        kind = data.get("model_type", "llama")
        kind = next((name for name, original in ORIGINAL_TYPES.items() if kind == original), kind)
        family: Family = one_of("language model_type", kind, tuple(FAMILIES))
        one_of("hidden_act", data.get("hidden_act", "silu"), ("silu",))
        if data.get("mlp_bias"):
            raise UserError("mlp_bias is not supported: LLaMA-family models of LLaVA have none")
        data = FAMILIES[family] | data
        num_heads = data.get("num_attention_heads", 32)
        num_layers = data.get("num_hidden_layers", 32)
        hidden_size = data.get("hidden_size", 4096)
        rope = data.get("rope_parameters") or {}
        bias = family == "llama" and data.get("attention_bias", False)
        return cls(
            vocab_size=data.get("vocab_size", 32000),
            hidden_size=hidden_size,
            intermediate_size=data["intermediate_size"],
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=data.get("num_key_value_heads") or num_heads,
            head_dim=data.get("head_dim") or hidden_size // num_heads,
            rope_theta=float(rope.get("rope_theta", data.get("rope_theta", 10000.0))),
            rope_scaling=RopeScaling.from_hf(rope or data.get("rope_scaling")),
            norm_eps=data.get("rms_norm_eps", 1e-6),
            tie_embeddings=data.get("tie_word_embeddings", False),
            qkv_bias=bias or family == "qwen2",
            output_bias=bias,
            max_length=data["max_position_embeddings"],
            family=family,
            sliding_window=_sliding_window(family, data, num_layers),
        )

    def to_hf(self) -> dict[str, Any]:
        """UserError if transformers' class of the family cannot express it."""
        biases = {"llama": self.qkv_bias == self.output_bias, "mistral": not (self.qkv_bias or self.output_bias)}
        biases["qwen2"] = self.qkv_bias and not self.output_bias
        if not biases[self.family] or (self.family == "llama" and self.sliding_window):
            raise UserError(
                f"a {self.family} model with q/k/v bias {self.qkv_bias}, output bias {self.output_bias} and sliding "
                f"window {self.sliding_window} cannot be exported: transformers has none"
            )
        own: dict[str, Any] = {"attention_bias": self.qkv_bias}
        if self.family != "llama":
            own = {"sliding_window": self.sliding_window}
        if self.family == "qwen2":
            own |= {
                "use_sliding_window": self.sliding_window is not None,
                "max_window_layers": self.num_layers if self.sliding_window is None else 0,
            }
        return {
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_hf() if self.rope_scaling else None,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_length,
            **own,
        }


def _sliding_window(family: Family, data: dict[str, Any], num_layers: int) -> int | None:
    """The window of every layer: Mistral's is on unless it is null, Qwen2 switches it on and may spare layers."""
    window = data.get("sliding_window")
    if family == "llama" or window is None or (family == "qwen2" and not data.get("use_sliding_window")):
        return None
    if family == "mistral":
        return window
    full = min(data["max_window_layers"], num_layers)
    types = data.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (num_layers - full)
    if len(set(types)) > 1:
        raise UserError(
            f"max_window_layers is {full} of {num_layers} layers: a sliding window in some layers only is not supported"
        )
    return window if types[0] == "sliding_attention" else None


def one_of(what: str, value: Any, known: tuple[str, ...]) -> Any:
    """``value``. Raises UserError if it is not among ``known``."""
    if value not in known:
        raise UserError(f"{what} {value!r} is not supported: {' or '.join(known)} is")
    return value
