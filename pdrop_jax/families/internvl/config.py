"""The config of a vision tower whose pictures are tiles, and the released sizes of InternVL3."""

import dataclasses
from typing import Any, Literal

from pdrop_jax.schema import Heads, Layers, NormEps, Pixels, Width
from pdrop_jax.text_config import RopeScaling, TextConfig
from pdrop_jax.vision_config import Activation, Kind, MergeSize, VisionConfig

TilesKind = Literal["internvl", "smolvlm", "idefics3"]
Size = Literal["1b", "2b", "8b", "14b", "38b", "78b"]


@dataclasses.dataclass(frozen=True)
class TiledVisionConfig(VisionConfig):
    """A tower of square crops: a picture is a grid of tiles and, if it has several, the whole of it as a further crop.

    Squares of ``merge_size`` patches a side become one token. The defaults are InternViT-300M of InternVL3-8B.
    """

    image_size: Pixels = 448
    patch_size: Pixels = 14
    hidden_size: Width = 1024
    intermediate_size: Width = 4096
    num_layers: Layers = 24
    num_heads: Heads = 16
    norm_eps: NormEps = 1e-6
    activation: Activation = "gelu"
    kind: Kind = "internvl"
    layer_scale: bool = True
    merge_size: MergeSize = 2

    @property
    def family(self) -> str:
        return self.kind

    @property
    def largest_picture(self) -> int | None:
        """Of 12 tiles (InternVL), or of 4 x 4 (SmolVLM and Idefics3), and the whole."""
        return (13 if self.kind == "internvl" else 17) * self.crop_features

    def levels(self, most: int) -> list[tuple[int, int]]:
        """One crop alone, then the whole with 2, 3, 4, 6, 8, 12, 16, 24, … tiles, up to ``most`` tokens or more."""
        tiles = [2]
        while (1 + tiles[-1]) * self.crop_features < most:
            tiles.append(3 if tiles[-1] == 2 else tiles[-2] * 2)
        return [(n, n * self.crop_features) for n in (1, *(1 + n for n in tiles))]


# Of the LlavaConfig of a released model.
FIELDS: dict[str, Any] = {
    "image_token_id": 151667,
    "bos_token_id": 151643,
    "eos_token_ids": (151645,),
}


def released_tower(size: Size) -> TiledVisionConfig:
    """InternViT-300M, or InternViT-6B for the two largest models."""
    if size not in ("38b", "78b"):
        return TiledVisionConfig()
    return TiledVisionConfig(
        hidden_size=3200,
        intermediate_size=12800,
        num_layers=45,
        num_heads=25,
        qkv_bias=False,
        rms_norm=True,
        qk_norm=True,
    )


def released_text(size: Size) -> TextConfig:
    """Qwen2.5 with InternVL's tokens."""
    D, F, L, N, K = {
        "1b": (896, 4864, 24, 14, 2),
        "2b": (1536, 8960, 28, 12, 2),
        "8b": (3584, 18944, 28, 28, 4),
        "14b": (5120, 13824, 48, 40, 8),
        "38b": (5120, 27648, 64, 40, 8),
        "78b": (8192, 29568, 80, 64, 8),
    }[size]
    return TextConfig(
        vocab_size=151674,
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        head_dim=D // N,
        rope_theta=1e6,
        rope_scaling=RopeScaling("dynamic", 2.0),
        norm_eps=1e-6,
        qkv_bias=True,
        max_length=32768,
        family="internvl",
    )
