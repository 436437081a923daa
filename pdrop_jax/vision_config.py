"""The config of a vision tower that takes square crops."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from pdrop_jax.errors import UserError
from pdrop_jax.schema import NO_OTHER_KEYS, Heads, Layers, NormEps, Pixels, Width

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
Kind = Literal["clip", "siglip", "internvl", "smolvlm", "idefics3"]

MAX_PATCHES_A_SIDE = 256


@dataclasses.dataclass(frozen=True)
class StandbyConfig:
    """Standby tokens of a tower, see ``model.standby``.

    Attributes:
      tokens: of each picture or frame.
      temporal_layers: the last so many layers of the tower have attention over time behind them.
      frames: in a block of frames that see each other.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    tokens: Literal[8, 16, 32] = 16
    temporal_layers: Annotated[int, Field(ge=1, le=1024)] = 5
    frames: Annotated[int, Field(ge=1, le=1024)] = 8


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP, SigLIP or InternViT tower. The defaults are CLIP's ViT-L/14 at 336 pixels, LLaVA-1.5's tower.

    Attributes:
      pooling_head: SigLIP's, unused in a LLaVA, but a checkpoint may contain it.
      layer_scale: what attention and mlp add to a layer's input is scaled by a vector first (InternViT).
      rms_norm: RMSNorm in front of attention and mlp, in place of LayerNorm.
      qk_norm: RMSNorm of the queries and of the keys, over all heads at once.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    image_size: Pixels = 336
    patch_size: Pixels = 14
    hidden_size: Width = 1024
    intermediate_size: Width = 4096
    num_layers: Layers = 24
    num_heads: Heads = 16
    norm_eps: NormEps = 1e-5
    activation: Activation = "quick_gelu"
    kind: Kind = "clip"
    pooling_head: bool = False
    qkv_bias: bool = True
    layer_scale: bool = False
    rms_norm: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.patches_a_side <= MAX_PATCHES_A_SIDE:
            raise UserError(
                f"a picture of {self.image_size} pixels a side in patches of {self.patch_size} is "
                f"{self.patches_a_side} patches a side: 1 to {MAX_PATCHES_A_SIDE} are supported"
            )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"the vision tower's hidden size of {self.hidden_size} is not a multiple of its "
                f"{self.num_heads} attention heads"
            )

    @property
    def patches_a_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def family(self) -> str:
        """The family beside LLaVA that has such a tower, or "LLaVA"."""
        return "LLaVA"

    @property
    def features_a_side(self) -> int:
        """Features a side of a crop: its tokens are made of these."""
        return self.patches_a_side

    @property
    def crop_features(self) -> int:
        """Features that the tower makes of a crop, without a class token."""
        return self.features_a_side**2

    @property
    def crop_shape(self) -> tuple[int, ...]:
        return self.image_size, self.image_size, 3

    @property
    def largest_picture(self) -> int | None:
        """Tokens of the largest picture of the released processor, if only that bounds them."""
        return None

    @property
    def layout_values(self) -> int:
        """Numbers that say where a patch is: none, its place in the crop says it."""
        return 0

    @property
    def deepstack_layers(self) -> tuple[int, ...]:
        return ()

    def levels(self, most: int) -> list[tuple[int, int]]:
        """The sizes that a picture in a bucket can have, ascending: (crops, tokens); ``most`` is the model's length."""
        return [(1, self.crop_features)]

    @property
    def num_patches(self) -> int:
        return self.patches_a_side**2

    @property
    def class_tokens(self) -> int:
        """Tokens in front of the patches: CLIP and InternViT have one, SigLIP none."""
        return 1 if self.kind in ("clip", "internvl") else 0

    @property
    def projector_inputs(self) -> int:
        """Numbers in a feature as the projector takes it."""
        return self.hidden_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads
