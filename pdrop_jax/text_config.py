"""The config of a decoder: what differs between language models is a field here, not a copy of the decoder."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from pdrop_jax.errors import UserError
from pdrop_jax.schema import NO_OTHER_KEYS, Heads, Layers, NormEps, Positions, Positive, RopeBase, Vocabulary, Width

Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
    "internvl",
    "smolvlm",
    "idefics3",
]
CacheDtype = Literal["int8", "int4"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies, as in transformers: ``linear``, ``llama3`` or ``dynamic``.

    The last one begins beyond the model's positions, which nothing here exceeds, so it is only carried along.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    kind: Literal["linear", "llama3", "dynamic"]
    factor: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_length: Positions = 8192

    def __post_init__(self) -> None:
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}: the first "
                "must be less than the second"
            )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A decoder of one of the families above. The defaults are LLaMA-2-7B, LLaVA-1.5-7B's language model."""

    __pydantic_config__ = NO_OTHER_KEYS

    vocab_size: Vocabulary = 32000
    hidden_size: Width = 4096
    intermediate_size: Width = 11008
    num_layers: Layers = 32
    num_heads: Heads = 32
    num_kv_heads: Heads = 32
    head_dim: Width = 128
    rope_theta: RopeBase = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: NormEps = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention's output projection
    max_length: Positions = 4096
    family: Family = "llama"  # its class in transformers; the other fields determine what runs
    sliding_window: Positions | None = None  # keys that a query sees, its own included; None is all up to it
    # M-RoPE: a token has three positions (time, height, width), and so many pairs of a head turn by each; None is one.
    mrope_sections: tuple[Width, Width, Width] | None = None
    mrope_interleaved: bool = False  # pairs turn by time, height, width, time, … (Qwen3-VL) instead of in three runs
    qk_norm: bool = False  # RMSNorm of each head's query and key before rope
    norm_plus_one: bool = False  # RMS norms scale by 1 + their weight
    post_norms: bool = False  # norms behind attention and mlp too, before the residual additions
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the gated mlp
    scaled_embeddings: bool = False  # embeddings of text times sqrt(hidden_size)
    query_scalar: Width | None = None  # attention logits are divided by its square root; None is head_dim
    # Layers that see everything although there is a sliding window. With them windows go by slots before the drops.
    full_layers: Annotated[tuple[Annotated[int, Field(ge=0, lt=1024)], ...], Field(max_length=1024)] = ()
    local_rope_theta: RopeBase | None = None  # of the layers with a window, never scaled; None is that of all layers
    # Tokens of a picture see each other in both directions, in layers with a window within it.
    two_way_images: bool = False
    # Of cached keys and values, with a scale for each token and head, see ``model.cache``; None is the activations'.
    # Not a part of checkpoints: it is chosen when a model is loaded.
    cache_dtype: CacheDtype | None = None

    def __post_init__(self) -> None:
        if self.mrope_sections and sum(self.mrope_sections) * 2 != self.head_dim:
            raise UserError(
                f"mrope_sections {list(self.mrope_sections)} must add up to half of head_dim {self.head_dim}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}: rotary embeddings need an even number")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads are not a multiple of {self.num_kv_heads} key-value heads"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"sliding_window is {self.sliding_window}: a token sees at least itself")
        if self.full_layers and (self.sliding_window is None or max(self.full_layers) >= self.num_layers):
            raise UserError(
                f"full_layers {list(self.full_layers)} are of a decoder of {self.num_layers} layers with sliding "
                f"window {self.sliding_window}"
            )

    @property
    def by_slots(self) -> bool:
        """Whether what a token sees goes by the slots before the drops and by pictures: ``model.slot_attention``."""
        return self.two_way_images or bool(self.full_layers) or self.local_rope_theta is not None

    def window_of(self, layer: int) -> int | None:
        """``sliding_window`` of one layer; None is everything."""
        return None if layer in self.full_layers else self.sliding_window
