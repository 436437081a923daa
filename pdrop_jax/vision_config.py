"""The config of a vision tower that takes square crops, and of how pictures become several crops."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from pdrop_jax.errors import UserError
from pdrop_jax.schema import NO_OTHER_KEYS, Heads, Layers, NormEps, Pixels, Width

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
Kind = Literal["clip", "siglip", "internvl", "smolvlm", "idefics3"]

MAX_PATCHES_A_SIDE = 256
MAX_TILES = 1024
MAX_SLICES = 9  # of a picture beside its thumbnail, as in MiniCPM-V; LLaVA-UHD has 6
WINDOW = 2  # patches a side of the squares that early compression makes one of

MergeSize = Annotated[int, Field(ge=1, le=64)]


@dataclasses.dataclass(frozen=True)
class EarlyCompression:
    """A module inside a vision tower that makes one patch of every 2 x 2 (LLaVA-UHD v4), see ``model.compression``.

    Attributes:
      after: the layer that it follows, counted from 0 as in LLaVA-UHD v4's code: after + 1 layers see all patches.
      kind: "window" is LLaVA-UHD v4's module. The others are what its paper compares it with: "unshuffle" is an MLP
        on the joined patches, "average" their mean, which has no weights.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    after: Annotated[int, Field(ge=0, lt=1024)] = 6
    kind: Literal["window", "unshuffle", "average"] = "window"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Pictures of any size as tiles, LLaVA-NeXT's anyres or LLaVA-UHD's slices; see ``inputs.anyres``.

    Attributes:
      pinpoints: (height, width) pixels of the resolutions that a picture is resized into.
      max_tiles: features beyond those of this many tiles are bilinearly downsampled (OneVision's anyres_max_9); None
        never downsamples.
      rounded: round the number of features that a picture covers before truncating it, as Hugging Face's code does.
      alone: tile a picture only if it is the only one of its row (OneVision).
      choice: "area" takes the resolution that keeps the most pixels and pads (LLaVA-NeXT), "aspect" the grid nearest in
        aspect to a picture and stretches (LLaVA-UHD), and leaves a picture of about one tile whole.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    pinpoints: Annotated[tuple[tuple[Pixels, Pixels], ...], Field(max_length=MAX_TILES)]
    max_tiles: Annotated[int, Field(ge=1, le=MAX_TILES)] | None = None
    rounded: bool = False
    alone: bool = False
    choice: Literal["area", "aspect"] = "area"

    @classmethod
    def next(cls, tile: int = 336) -> "Tiling":
        """LLaVA-NeXT's five resolutions, of tiles of ``tile`` pixels."""
        return cls(tuple((h * tile, w * tile) for h, w in ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))))

    @classmethod
    def slices(cls, tile: int = 336, most: int = MAX_SLICES) -> "Tiling":
        """LLaVA-UHD's grids of 2 to ``most`` slices of ``tile`` pixels."""
        grids = ((h, w) for h in range(1, most + 1) for w in range(1, most // h + 1) if h * w > 1)
        return cls(tuple((h * tile, w * tile) for h, w in grids), choice="aspect")


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
      early_compression: makes a quarter of the patches inside the tower; None keeps all.
      merge_size: squares of so many features a side are joined and projected to one token.
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
    early_compression: EarlyCompression | None = None
    merge_size: MergeSize = 1

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
        if self.early_compression and self.patches_a_side % WINDOW:
            raise UserError(
                f"early compression takes windows of {WINDOW} x {WINDOW} patches, but this vision tower has "
                f"{self.patches_a_side} patches a side ({self.image_size} pixels in patches of {self.patch_size}), "
                "which is odd"
            )
        if self.compressed_side % self.merge_size:
            raise UserError(
                f"{self.compressed_side} patches a side cannot be merged by squares of {self.merge_size} a side: the "
                "first must be a multiple of the second"
            )

    @property
    def patches_a_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def compressed_side(self) -> int:
        """Patches a side that the tower puts out."""
        return self.patches_a_side // WINDOW if self.early_compression else self.patches_a_side

    @property
    def family(self) -> str:
        """The family beside LLaVA that has such a tower, or "LLaVA"."""
        return "LLaVA"

    @property
    def features_a_side(self) -> int:
        """Features a side of a crop: its tokens are made of these."""
        return self.compressed_side // self.merge_size

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
        return self.hidden_size * self.merge_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads
