"""The config of a vision tower whose pictures are tiles, and the released sizes of InternVL3 and 3.5."""

import dataclasses
from typing import Any, Literal

from pdrop_jax.schema import Heads, Layers, NormEps, Pixels, Width
from pdrop_jax.text_config import RopeScaling, TextConfig
from pdrop_jax.vision_config import Activation, Kind, MergeSize, VisionConfig

TilesKind = Literal["internvl", "smolvlm", "idefics3"]
Size = Literal[
    "3-1b", "3-2b", "3-8b", "3-14b", "3-38b", "3-78b", "3.5-1b", "3.5-2b", "3.5-4b", "3.5-8b", "3.5-14b", "3.5-38b"
]


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


# Hidden size, width of the mlp, layers, heads, key-value heads of the decoders: Qwen2.5 in InternVL3, Qwen3 in 3.5.
DECODERS: dict[Size, tuple[int, int, int, int, int]] = {
    "3-1b": (896, 4864, 24, 14, 2),
    "3-2b": (1536, 8960, 28, 12, 2),
    "3-8b": (3584, 18944, 28, 28, 4),
    "3-14b": (5120, 13824, 48, 40, 8),
    "3-38b": (5120, 27648, 64, 40, 8),
    "3-78b": (8192, 29568, 80, 64, 8),
    "3.5-1b": (1024, 3072, 28, 16, 8),
    "3.5-2b": (2048, 6144, 28, 16, 8),
    "3.5-4b": (2560, 9728, 36, 32, 8),
    "3.5-8b": (4096, 12288, 36, 32, 8),
    "3.5-14b": (5120, 17408, 40, 40, 8),
    "3.5-38b": (5120, 25600, 64, 64, 8),
}


def released_fields(size: Size) -> dict[str, Any]:
    """Of the ``LlavaConfig``."""
    image_token = 151671 if size.startswith("3.5") else 151667
    return {"image_token_id": image_token, "bos_token_id": 151643, "eos_token_ids": (151645,)}


def released_tower(size: Size) -> TiledVisionConfig:
    """InternViT-300M, or InternViT-6B for the largest models."""
    if not size.endswith(("38b", "78b")):
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
    """Qwen2.5 or Qwen3 with InternVL's tokens."""
    D, F, L, N, K = DECODERS[size]
    text = TextConfig(
        vocab_size=151674,
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        head_dim=D // N,
        rope_theta=1e6,
        norm_eps=1e-6,
        max_length=32768,
        family="internvl",
    )
    if size.startswith("3.5"):
        return dataclasses.replace(text, vocab_size=151936, head_dim=128, qk_norm=True, max_length=40960)
    return dataclasses.replace(text, rope_scaling=RopeScaling("dynamic", 2.0), qkv_bias=True)
