"""Images by their standby tokens alone, and frames of a stream, which come one at a time and are never tiled."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageTokens, whole
from pdrop_jax.inputs.families import FAMILIES
from pdrop_jax.inputs.images import ImageProcessor, Picture, Video, open_image, plain, to_crop


@dataclasses.dataclass(frozen=True)
class Standby:
    """An image or a video that is shown by its standby tokens alone, mode "standby"; without it the mode is "focus".

    A few tokens for each picture or frame take the place of its patches, and no drop takes them away.
    """

    image: Picture | Video


def standby_as_tokens(shown: Standby, processor: ImageProcessor, config: LlavaConfig) -> ImageTokens:
    """The model's input for what ``Standby`` shows; pictures are never tiled.

    Raises:
      UserError: the model has no standby tokens, the video has no frame, or a picture cannot be read.
    """
    if not config.standby:
        raise UserError(
            'mode "standby" needs a model with standby tokens: convert the checkpoint with --standby 16 and train them'
        )
    video = isinstance(shown.image, Video)
    frames: Sequence[Any] = shown.image.frames if isinstance(shown.image, Video) else [shown.image]
    if not frames:
        raise UserError("a video needs at least one frame, got none")
    crops = np.stack([untiled(open_image(frame), processor, config) for frame in frames])
    tokens = len(crops) * config.standby_tokens
    return ImageTokens(crops, np.arange(tokens, dtype=np.int32)[:, None], video=video, standby=tokens)


def untiled(image: Image.Image, processor: ImageProcessor, config: LlavaConfig) -> np.ndarray:
    """An RGB image as one crop (h, w, 3) of a LLaVA, whether or not it tiles pictures."""
    if config.tiling:
        return to_crop(image, plain(processor), "square")
    return to_crop(image, processor, config.image_aspect)


def open_frames(frames: Any, size: tuple[int, int] | None, seen: int = 0) -> Iterator[Image.Image]:
    """RGB images of ``frames``, a ``Video`` or anything that yields pictures, one at a time.

    Args:
      size: (width, height) pixels of the frames before; None is that of the first one.
      seen: number of frames before, by which errors count.

    Raises:
      UserError: they are not several pictures, one cannot be read, or it has another size.
    """
    if isinstance(frames, Video):
        frames = frames.frames
    if isinstance(frames, Picture) or not isinstance(frames, Iterable):
        found = "a single picture" if isinstance(frames, Picture) else f"a {type(frames).__name__}"
        raise UserError(f"watch takes a list of frames or anything that yields them, got {found}")
    for number, frame in enumerate(frames, seen + 1):
        if not isinstance(frame, Picture):
            raise UserError(f"frame {number} is a {type(frame).__name__}: expected a path, an image or an array")
        image = open_image(frame)
        size = size or image.size
        if image.size != size:
            raise UserError(
                f"frame {number} has {image.width}x{image.height} pixels, but those before have {size[0]}x{size[1]}: "
                "resize all frames to one size, or start a new session"
            )
        yield image


def frame_tokens(image: Image.Image, processor: ImageProcessor, config: LlavaConfig) -> ImageTokens:
    """The model's input for one frame.

    Raises:
      UserError: the model writes text between the parts of a picture.
    """
    if family := FAMILIES.get(config.family):
        found = family.picture_tokens(image, processor, config)
        if found.parts > 1:
            raise UserError(
                f"frames of this size are {found.parts} parts with text between them for a {config.family} model, "
                "which watch does not support: turn tiling off in preprocessor_config.json"
            )
        return found
    return whole(untiled(image, processor, config), config)


def with_standby(frame: ImageTokens, config: LlavaConfig) -> ImageTokens:
    """A frame with its standby tokens behind its other ones."""
    own = np.arange(config.standby_tokens, dtype=np.int32)[:, None]
    return ImageTokens(frame.crops, np.concatenate([frame.index, own]), standby=config.standby_tokens)
