"""Cost of the vision tower and of what connects it with the decoder, in multiply-accumulates (MACs). Pure Python."""

import dataclasses

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.vision_config import WINDOW, EarlyCompression, VisionConfig


@dataclasses.dataclass(frozen=True)
class TowerMacs:
    """MACs for the crops of a bucket. Without early compression, all layers are the first ones.

    Attributes:
      first: the embedding of patches and the layers that see all of them.
      compressor: early compression.
      later: the layers behind it.
      projector: what turns features into tokens.
    """

    first: int
    compressor: int
    later: int
    projector: int

    @property
    def vision(self) -> int:
        return self.first + self.compressor + self.later


def layer_macs(n: int, D: int, N: int, K: int, H: int, mlp: int) -> int:
    """MACs of a transformer layer on n tokens, with ``mlp`` weights in its MLP."""
    return n * (2 * D * N * H + 2 * D * K * H + mlp) + 2 * n * n * N * H


def tower_macs(config: LlavaConfig, bucket: Bucket) -> TowerMacs:
    vision = config.vision
    if isinstance(vision, QwenVisionConfig):
        return _qwen(config, vision, bucket.crops)
    V, F, compression = vision.hidden_size, vision.intermediate_size, vision.early_compression
    layer = V, vision.num_heads, vision.num_heads, vision.head_dim, 2 * V * F
    first = compression.after + 1 if compression else config.vision_layers
    all_tokens = vision.class_tokens + vision.num_patches
    late_tokens = vision.class_tokens + vision.compressed_side**2
    projector = (config.image_tokens + config.frame_tokens) * (
        vision.projector_inputs * config.text.hidden_size + (config.projector_layers - 1) * config.text.hidden_size**2
    )
    return TowerMacs(
        bucket.crops * (first * layer_macs(all_tokens, *layer) + vision.num_patches * 3 * vision.patch_size**2 * V),
        bucket.crops * compressor_macs(compression, vision, vision.num_patches, matrices=2),
        bucket.crops * (config.vision_layers - first) * layer_macs(late_tokens, *layer),
        bucket.crops * projector,
    )


def compressor_macs(
    compression: EarlyCompression | None, vision: VisionConfig | QwenVisionConfig, patches: int, matrices: int
) -> int:
    """MACs of the module on ``patches`` patches; ``matrices`` is how many an MLP of the tower has."""
    if compression is None or compression.kind == "average":
        return 0
    V, F, joined = vision.hidden_size, vision.intermediate_size, WINDOW**2
    windows = patches // joined
    if compression.kind == "unshuffle":
        return windows * (joined * V * joined * V + joined * V * V)
    attention = patches * (4 * V * V + 2 * joined * V)
    # The first matrices are (4V, 4F), with the zeros beside their blocks; the last one is (4F, V).
    return attention + windows * ((matrices - 1) * joined * V * joined * F + joined * F * V)


def _qwen(config: LlavaConfig, vision: QwenVisionConfig, crops: int) -> TowerMacs:
    V, N, H, D = vision.hidden_size, vision.num_heads, vision.head_dim, config.text.hidden_size
    matrices = 3 if vision.activation is None else 2
    compression, merged = vision.early_compression, V * vision.merge_size**2
    first = compression.after + 1 if compression else vision.num_layers

    def layers(numbers: range, window: int) -> int:
        """Of layers on windows of so many patches, of which some see all patches of a row."""
        full = len(numbers) if vision.window_size is None else sum(n in vision.full_layers for n in numbers)
        shape = V, N, N, H, matrices * V * vision.intermediate_size
        return full * layer_macs(crops * window, *shape) + (len(numbers) - full) * crops * layer_macs(window, *shape)

    patches = vision.window_patches
    merger = crops * vision.window_tokens * (merged**2 + merged * D)
    return TowerMacs(
        layers(range(first), patches) + crops * patches * vision.patch_values * V,
        compressor_macs(compression, vision, crops * patches, matrices),
        layers(range(first, vision.num_layers), patches // WINDOW**2),
        merger * (1 + config.additions),
    )
