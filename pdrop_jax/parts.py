"""The two parts of a LLaVA, a vision tower and a language model: frozen configs."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from pdrop_jax.errors import UserError
from pdrop_jax.schema import NO_OTHER_KEYS, NormEps, Positive

Family = Literal["llama", "mistral", "qwen2"]
Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]

# Types with the ranges that a config file is held to; far beyond any model, but small enough to compute shapes from.
Width = Annotated[int, Field(ge=1, le=2**20)]
Heads = Annotated[int, Field(ge=1, le=2**14)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
Positions = Annotated[int, Field(ge=1, le=2**27)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
TokenId = Annotated[int, Field(ge=0, lt=2**24)]
RopeBase = Annotated[float, Field(gt=0, le=1e12)]

MAX_PATCHES_A_SIDE = 256


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP vision transformer. The defaults are CLIP's ViT-L/14 at 336 pixels, LLaVA-1.5's tower."""

    __pydantic_config__ = NO_OTHER_KEYS

    image_size: Pixels = 336
    patch_size: Pixels = 14
    hidden_size: Width = 1024
    intermediate_size: Width = 4096
    num_layers: Layers = 24
    num_heads: Heads = 16
    norm_eps: NormEps = 1e-5
    activation: Activation = "quick_gelu"
    kind: Literal["clip", "siglip"] = "clip"
    pooling_head: bool = False  # SigLIP's: it never runs in a LLaVA, but a checkpoint may hold it

    def __post_init__(self) -> None:
        if not 1 <= self.patches_a_side <= MAX_PATCHES_A_SIDE:
            raise UserError(
                f"a picture of {self.image_size} pixels a side in patches of {self.patch_size} is "
                f"{self.patches_a_side} patches a side: 1 to {MAX_PATCHES_A_SIDE} are supported"
            )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"the vision tower's hidden size of {self.hidden_size} cannot be shared by {self.num_heads} attention "
                "heads: not a multiple"
            )

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
    """A decoder of the LLaMA, Mistral or Qwen2 family. The defaults are LLaMA-2-7B, LLaVA-1.5-7B's language model."""

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
    family: Family = "llama"  # which class of transformers it is; what runs is told by the other fields
    sliding_window: Positions | None = None  # keys that a query sees, itself included; None is all before it

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}: rotary embeddings need an even number")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads: not a multiple"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"sliding_window is {self.sliding_window}: a token sees at least itself")
