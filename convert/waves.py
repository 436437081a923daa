"""A picture that needs no file, by which a converted model is compared with PyTorch's."""

import numpy as np

from pdrop_jax.config import LlavaConfig
from pdrop_jax.inputs.anyres import ImageTokens, whole


def waves(side: int) -> np.ndarray:
    """A picture of waves (side, side, 3) float32, of another direction in each channel."""
    t = np.linspace(0, 12, side, dtype=np.float32)
    return np.stack([np.sin(t[:, None] * a + t * b) for a, b in ((1, 0), (0, 1), (1, 1))], axis=-1)


def one_crop(config: LlavaConfig) -> ImageTokens:
    return whole(waves(config.crop_tower.image_size), config)
