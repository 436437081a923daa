"""The config of Gemma 3's vision tower, and its released language models."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from pdrop_jax.errors import UserError
from pdrop_jax.schema import Heads, Layers, NormEps, Pixels, TokenId, Width
from pdrop_jax.text_config import RopeScaling, TextConfig
from pdrop_jax.vision_config import Activation, Kind, VisionConfig

GemmaSize = Literal["4b", "12b", "27b"]


@dataclasses.dataclass(frozen=True)
class GemmaVisionConfig(VisionConfig):
    """SigLIP with its last norm, whose features are averaged over squares. The defaults are Gemma 3's tower.

    Attributes:
      tokens_a_side: tokens a side of a picture, behind the averages.
      start_token_id, end_token_id: of the marks around a picture.
    """

    image_size: Pixels = 896
    patch_size: Pixels = 14
    hidden_size: Width = 1152
    intermediate_size: Width = 4304
    num_layers: Layers = 27
    num_heads: Heads = 16
    norm_eps: NormEps = 1e-6
    activation: Activation = "gelu_tanh"
    kind: Kind = "siglip"
    tokens_a_side: Annotated[int, Field(ge=1, le=256)] = 16
    start_token_id: TokenId = 255999
    end_token_id: TokenId = 256000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patches_a_side % self.tokens_a_side:
            raise UserError(
                f"{self.patches_a_side} patches a side cannot be averaged to {self.tokens_a_side} tokens a side: the "
                "first must be a multiple of the second"
            )
        if self.merge_size != 1:
            raise UserError(f"a Gemma 3 tower averages its features and merges none, got merge_size {self.merge_size}")

    @property
    def family(self) -> str:
        return "gemma3"

    @property
    def features_a_side(self) -> int:
        return self.tokens_a_side


def gemma3_text(size: GemmaSize) -> TextConfig:
    D, F, L, N, K, H, scalar = {
        "4b": (2560, 10240, 34, 8, 4, 256, 256),
        "12b": (3840, 15360, 48, 16, 8, 256, 256),
        "27b": (5376, 21504, 62, 32, 16, 128, 168),
    }[size]
    return TextConfig(
        vocab_size=262208,
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        rope_theta=1e6,
        rope_scaling=RopeScaling("linear", 8.0),
        norm_eps=1e-6,
        tie_embeddings=True,
        max_length=131072,
        family="gemma3",
        sliding_window=1024,
        qk_norm=True,
        norm_plus_one=True,
        post_norms=True,
        activation="gelu_tanh",
        scaled_embeddings=True,
        query_scalar=scalar,
        full_layers=tuple(range(5, L, 6)),
        local_rope_theta=1e4,
        two_way_images=True,
    )
