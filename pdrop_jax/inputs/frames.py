"""Frames of a stream, which come one at a time: pictures of one size, never tiled."""

from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageTokens, whole
from pdrop_jax.inputs.families import FAMILIES
from pdrop_jax.inputs.images import ImageProcessor, Picture, Video, open_image, plain, to_crop


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
    if config.tiling:
        return whole(to_crop(image, plain(processor), "square"), config)
    return whole(to_crop(image, processor, config.image_aspect), config)
