"""The config of the vision tower of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and the released sizes of Qwen2.5-VL."""

import dataclasses
import itertools
import math
from typing import Annotated, Literal

from pydantic import Field

from pdrop_jax.errors import UserError
from pdrop_jax.schema import NO_OTHER_KEYS, Heads, Layers, NormEps, Pixels, TokenId, Width
from pdrop_jax.text_config import TextConfig
from pdrop_jax.vision_config import WINDOW, EarlyCompression

Kind = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
LayerNumbers = Annotated[tuple[Annotated[int, Field(ge=0, lt=1024)], ...], Field(max_length=1024)]


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """A vision transformer over grids of patches of any size. The defaults are Qwen2.5-VL's tower.

    A patch is ``patch_size`` pixels a side in ``temporal_patch_size`` frames; squares of ``merge_size`` of the patches
    that the tower puts out become one token. Qwen2-VL has LayerNorm and a plain MLP, Qwen2.5-VL RMSNorm, a gated MLP
    and windows, Qwen3-VL what Qwen2-VL has, learned positions and DeepStack.

    Attributes:
      activation: of the plain MLP; None is the gated one's SiLU.
      window_size: pixels a side of the windows that patches see in most layers; None is the whole picture in every
        layer (Qwen2-VL).
      full_layers: layers that see the whole picture nevertheless.
      start_token_id, end_token_id: of the marks around a picture.
      tokens_per_second: temporal positions of a second of video; None is one position for each step (Qwen2-VL).
      position_side: learned positions a side of the square that is resized to a picture's grid; None has no learned
        positions, and no bias of the patches' embedding.
      early_compression: makes a quarter of the patches inside the tower, in front of the merger; None keeps all.
      deepstack_layers: layers, from 0 on, whose outputs are merged too. The first is added to the image tokens behind
        the decoder's first layer, the next behind its second, and so on.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    kind: Kind = "qwen2_5_vl"
    patch_size: Pixels = 14
    temporal_patch_size: Annotated[int, Field(ge=1, le=64)] = 2
    merge_size: Annotated[int, Field(ge=1, le=64)] = 2
    hidden_size: Width = 1280
    intermediate_size: Width = 3420
    num_layers: Layers = 32
    num_heads: Heads = 16
    norm_eps: NormEps = 1e-6
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] | None = None
    window_size: Pixels | None = 112
    full_layers: LayerNumbers = (7, 15, 23, 31)
    tokens_per_second: Annotated[int, Field(ge=1, le=2**14)] | None = 4
    start_token_id: TokenId = 151652
    end_token_id: TokenId = 151653
    position_side: Annotated[int, Field(ge=1, le=4096)] | None = None
    deepstack_layers: LayerNumbers = ()
    early_compression: EarlyCompression | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(
                f"the vision tower's hidden size of {self.hidden_size} is not a multiple of 4 for each of its "
                f"{self.num_heads} attention heads, which rotary positions in two dimensions need"
            )
        if self.window_size is not None and self.window_size < self.cell:
            raise UserError(
                f"windows of {self.window_size} pixels are smaller than a token of {self.cell} pixels a side"
            )
        taken = self.deepstack_layers
        if any(b <= a for a, b in itertools.pairwise(taken)) or any(n >= self.num_layers for n in taken):
            raise UserError(
                f"deepstack layers {list(taken)} must be ascending and below the tower's {self.num_layers} layers"
            )
        if self.early_compression and taken and self.early_compression.after >= taken[0]:
            raise UserError(
                f"early compression after layer {self.early_compression.after} is too late: the output of layer "
                f"{taken[0]} is merged too (deepstack), and must be compressed by then"
            )

    @property
    def family(self) -> str:
        return self.kind

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def class_tokens(self) -> int:
        return 0

    @property
    def gated(self) -> bool:
        """RMSNorm and a gated MLP, as in Qwen2.5-VL; otherwise LayerNorm and a plain MLP."""
        return self.kind == "qwen2_5_vl"

    @property
    def token_side(self) -> int:
        """Patches a side of a token."""
        return self.merge_size * (WINDOW if self.early_compression else 1)

    @property
    def cell(self) -> int:
        """Pixels a side of a token."""
        return self.patch_size * self.token_side

    @property
    def window_side(self) -> int:
        """Tokens a side of a window; without windows a token is laid out by itself."""
        return 1 if self.window_size is None else self.window_size // self.cell

    @property
    def window_tokens(self) -> int:
        return self.window_side**2

    @property
    def crop_features(self) -> int:
        """Features of a window, which is what the tower takes in place of a crop."""
        return self.window_tokens

    @property
    def crop_shape(self) -> tuple[int, ...]:
        return self.window_patches, self.patch_values

    @property
    def window_patches(self) -> int:
        return self.window_tokens * self.token_side**2

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: channels, frames and pixels, in this order."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def layout_values(self) -> int:
        """Numbers that say where a patch is: row, column and frame; with learned positions also rows and columns."""
        return 3 if self.position_side is None else 5

    def levels(self, most: int) -> list[tuple[int, int]]:
        """The sizes that a picture in a bucket can have, ascending: (windows, tokens).

        Tokens are 16, 24, 32, 48, 64, 96, … up to ``most`` or more. Windows are enough for pictures up to four times as
        wide as high; a longer one, whose windows are emptier, has a larger level.
        """
        tokens = [16]
        while tokens[-1] < most:
            tokens.append(tokens[-1] * 3 // 2 if tokens[-1] & (tokens[-1] - 1) == 0 else tokens[-1] * 4 // 3)
        return [(self._most_windows(n), n) for n in tokens]

    def _most_windows(self, tokens: int) -> int:
        side, edges = self.window_side, 2.5 * math.sqrt(tokens)  # height and width of a picture four times as wide
        rest = (side - 1) / side  # of a window may be empty at each edge
        return math.ceil(tokens / side**2 + rest * edges / side + rest**2) if side > 1 else tokens


def released(size: Literal["3b", "7b", "32b", "72b"]) -> tuple[TextConfig, QwenVisionConfig]:
    """Decoder and tower of Qwen2.5-VL."""
    D, F, L, N, K = {
        "3b": (2048, 11008, 36, 16, 2),
        "7b": (3584, 18944, 28, 28, 4),
        "32b": (5120, 27648, 64, 40, 8),
        "72b": (8192, 29568, 80, 64, 8),
    }[size]
    text = TextConfig(
        vocab_size=151936 if size == "3b" else 152064,
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        rope_theta=1e6,
        norm_eps=1e-6,
        tie_embeddings=size == "3b",
        qkv_bias=True,
        max_length=128000,
        family="qwen2_5_vl",
        mrope_sections=(16, 24, 24),
    )
    return text, QwenVisionConfig(intermediate_size=3456 if size in ("32b", "72b") else 3420, tokens_per_second=2)
