"""Videos of Qwen3-VL, on the host: every step stands in the text by itself, behind the time that it shows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pdrop_jax.config import LlavaConfig
from pdrop_jax.families.qwen2_vl import inputs as qwen2_vl
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.inputs.anyres import ImageTokens


def video_tokens(frames: Sequence[Image.Image], fps: float, processor: Any, config: LlavaConfig) -> ImageTokens:
    """``qwen2_vl.video_tokens`` in as many parts as the video has steps; time is in their captions, not in positions.

    Example, three frames at two a second::

        <0.2 seconds>   frames 0 and 1
        <1.0 seconds>   frame 2, twice
    """
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    found = qwen2_vl.video_tokens(frames, fps, processor, config)
    assert found.positions is not None
    return dataclasses.replace(
        found,
        positions=found.positions * np.array([0, 1, 1], np.int32),
        captions=tuple(f"<{time:.1f} seconds>" for time in times(len(frames), fps, vision.temporal_patch_size)),
    )


def times(frames: int, fps: float, depth: int) -> list[float]:
    """Seconds halfway between the first and the last frame of each step of ``depth`` frames."""
    last = frames - 1
    return [(n / fps + min(n + depth - 1, last) / fps) / 2 for n in range(0, frames, depth)]


FAMILY = dataclasses.replace(qwen2_vl.FAMILY, video_tokens=video_tokens)
