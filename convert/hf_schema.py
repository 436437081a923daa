"""Schemas for the config files of PyTorch checkpoints: types, ranges, and an upper bound on every size.

Only the keys that are used here are declared; transformers writes many more. Keys may be null where transformers itself
writes null.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from pdrop_jax.config import MAX_TILES
from pdrop_jax.errors import UserError
from pdrop_jax.schema import (
    Heads,
    Layers,
    NormEps,
    Pixels,
    Positions,
    Positive,
    RopeBase,
    TokenId,
    Vocabulary,
    Width,
)

T = TypeVar("T")

Resolutions = Annotated[list[tuple[Pixels, Pixels]], Field(max_length=MAX_TILES)]


class Section(BaseModel):
    """A config, or a table in one; keys that are not declared are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Rope(Section):
    """``rope_scaling`` of transformers 4, ``rope_parameters`` of 5, which holds ``rope_theta`` too."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: RopeBase | None = None
    factor: Positive | None = None
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Positions = 8192


class Text(Section):
    """A language model of the families in ``FAMILIES``; defaults that differ between them are filled in first."""

    model_type: str = "llama"
    vocab_size: Vocabulary = 32000
    hidden_size: Width = 4096
    intermediate_size: Width
    num_hidden_layers: Layers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None
    hidden_act: str = "silu"
    rms_norm_eps: NormEps = 1e-6
    rope_theta: RopeBase = 10000.0
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    max_position_embeddings: Positions
    tie_word_embeddings: bool | None = False
    attention_bias: bool | None = False
    mlp_bias: bool | None = False
    sliding_window: Positions | None = None
    use_sliding_window: bool | None = False
    max_window_layers: Annotated[int, Field(ge=0, le=2**16)] | None = None
    layer_types: Annotated[list[str], Field(max_length=1024)] | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | Annotated[list[TokenId], Field(max_length=64)] | None = None


class Vision(Section):
    """A CLIP or SigLIP tower. None stands for transformers' default, which differs between the two."""

    model_type: str = "clip_vision_model"
    image_size: Pixels = 224
    patch_size: Pixels | None = None
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    layer_norm_eps: NormEps | None = None
    hidden_act: str | None = None
    vision_use_head: bool = True
    vision_config: dict[str, Any] | None = None  # in the config of a whole CLIP or SigLIP, beside its text model


class GenerationSettings(Section):
    """generation_config.json."""

    eos_token_id: TokenId | Annotated[list[TokenId], Field(max_length=64)] | None = None


class Preprocessor(Section):
    """preprocessor_config.json."""

    do_pad: bool | None = False


class Llava(Section):
    """config.json of transformers' LLaVA classes."""

    model_type: str
    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = False
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: str = "default"
    vision_aspect_ratio: str = "anyres_max_9"
    spatial_pool_mode: str = "average"
    spatial_pool_stride: Pixels = 2
    image_grid_pinpoints: Any = None
    image_token_index: TokenId | None = None
    image_token_id: TokenId | None = None
    video_token_index: TokenId | None = None
    video_token_id: TokenId | None = None


class OriginalLlava(Section):
    """The keys that the original LLaVA code adds to the config of the language model."""

    model_type: str
    mm_vision_select_layer: int
    mm_hidden_size: Width
    mm_use_im_start_end: bool | None = False
    mm_vision_tower: str | None = None
    mm_vision_select_feature: str = "patch"
    mm_projector_type: str = "linear"
    mm_patch_merge_type: str = "flat"
    image_aspect_ratio: str | None = None
    image_grid_pinpoints: Any = None


def one_of(what: str, value: T, known: tuple[str, ...]) -> T:
    """``value``. Raises UserError if it is not among ``known``."""
    if value not in known:
        raise UserError(f"{what} {value!r} is not supported, expected {' or '.join(known)}")
    return value
