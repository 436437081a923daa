"""The config of Gemma 3's vision tower."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from pdrop_jax.errors import UserError
from pdrop_jax.schema import Heads, Layers, NormEps, Pixels, TokenId, Width
from pdrop_jax.vision_config import Activation, VisionConfig


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
    kind: Literal["clip", "siglip"] = "siglip"
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

    @property
    def features_a_side(self) -> int:
        return self.tokens_a_side
