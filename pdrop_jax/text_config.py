"""The config of a decoder: what differs between language models is a field here, not a copy of the decoder."""

import dataclasses
from typing import Literal

from pdrop_jax.errors import UserError
from pdrop_jax.schema import NO_OTHER_KEYS, Heads, Layers, NormEps, Positions, Positive, RopeBase, Vocabulary, Width

Family = Literal["llama", "mistral", "qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies, as in transformers: ``linear`` or ``llama3``."""

    __pydantic_config__ = NO_OTHER_KEYS

    kind: Literal["linear", "llama3"]
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
    qk_norm: bool = False  # RMSNorm of each head's query and key before rope
    max_length: Positions = 4096
    family: Family = "llama"  # its class in transformers; the other fields determine what runs
    sliding_window: Positions | None = None  # keys that a query sees, its own included; None is all up to it
    # M-RoPE: a token has three positions (time, height, width), and so many pairs of a head turn by each; None is one.
    mrope_sections: tuple[Width, Width, Width] | None = None
    mrope_interleaved: bool = False  # pairs turn by time, height, width, time, … (Qwen3-VL) instead of in three runs

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
