"""Pictures and videos for InternVL, on the host: a picture as tiles and a thumbnail, a frame of a video as one crop.

A picture is resized to the grid of tiles whose aspect is the nearest (transformers' own processor), and if that has
several tiles, the whole picture follows as one more crop. All of its crops stand in one run of tokens::

    <img> tile 1, tile 2, …, thumbnail </img>
"""

import copy
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageSize, ImageTokens
from pdrop_jax.inputs.chat_template import ImagePlaces
from pdrop_jax.inputs.family import HostFamily
from pdrop_jax.inputs.image_settings import Settings, making_processor, read_settings

MOST_TILES = 128
Tiles = Annotated[int, Field(ge=1, le=MOST_TILES)]


class TileSettings(Settings):
    """The keys of preprocessor_config.json that affect pixels and tiles.

    ``crop_to_patches`` is not one: transformers' InternVLProcessor tiles whatever it says.
    """

    min_patches: Tiles | None = None
    max_patches: Tiles | None = None


def load_processor(folder: pathlib.Path, config: LlavaConfig) -> GotOcr2ImageProcessorPil:
    """The image processor described in ``folder``, or the one of transformers.

    Raises:
      UserError: the description cannot be read, or its tiles are not those of the model.
    """
    side = config.crop_tower.image_size
    square = {"height": side, "width": side}
    settings = {"size": square} | read_settings(folder, TileSettings)
    with making_processor(folder):
        processor = GotOcr2ImageProcessorPil(**settings)
    size = processor.size
    if not processor.do_resize or processor.do_center_crop or (size.height, size.width) != (side, side):
        raise UserError(
            f"the image processor in {folder} does not resize pictures to tiles of the vision tower's {side}x{side} "
            "pixels: copy the preprocessor_config.json of this model"
        )
    if processor.min_patches > processor.max_patches:
        raise UserError(
            f"the image processor in {folder} has min_patches {processor.min_patches} above max_patches "
            f"{processor.max_patches}"
        )
    return processor


def picture_tokens(image: Image.Image, processor: Any, config: LlavaConfig) -> ImageTokens:
    """The model's input for an RGB image.

    Raises:
      UserError: it has more tokens than the model has positions.
    """
    size = image.size[::-1]
    measure(size, processor, config)
    found = processor(image, crop_to_patches=True, return_tensors="np")["pixel_values"]
    return crops_as_tokens(found, config, grid=grid_of(size, processor, config))


def measure(size: tuple[int, int], processor: Any, config: LlavaConfig) -> ImageSize:
    """Crops and tokens of a picture of ``size`` (height, width) pixels. Raises UserError as ``picture_tokens``."""
    rows, columns = grid_of(size, processor, config)
    return check_length(
        size, rows * columns + (rows * columns > 1), config, f"max_patches, now {processor.max_patches}"
    )


def grid_of(size: tuple[int, int], processor: Any, config: LlavaConfig) -> tuple[int, int]:
    """Rows and columns of tiles of a picture of ``size`` (height, width) pixels."""
    tile = config.crop_tower.image_size
    columns, rows = get_optimal_tiled_canvas(size, (tile, tile), processor.min_patches, processor.max_patches)
    return rows, columns


def check_length(size: tuple[int, int], crops: int, config: LlavaConfig, bound: str) -> ImageSize:
    """The size of a picture of ``crops``. Raises UserError if the model has fewer positions, which names ``bound``."""
    tokens = crops * config.vision.crop_features
    if tokens > config.text.max_length:
        raise UserError(
            f"a picture of {size[1]}x{size[0]} pixels becomes {tokens} tokens in {crops} crops, but the model has "
            f"{config.text.max_length} positions: lower the bound in preprocessor_config.json ({bound})"
        )
    return ImageSize(crops, tokens)


def crops_as_tokens(pixels: Any, config: LlavaConfig, grid: tuple[int, int] | None = None) -> ImageTokens:
    """One image of all crops ``pixels`` (n, 3, h, w); ``grid`` is that of its tiles."""
    crops = np.ascontiguousarray(np.asarray(pixels, np.float32).transpose(0, 2, 3, 1))
    index = np.arange(len(crops) * config.vision.crop_features, dtype=np.int32)
    return ImageTokens(crops, index[:, None], grid=grid)


def coarser(processor: Any, config: LlavaConfig) -> list[Any]:
    """The same image processor with each smaller ``max_patches``."""
    found = []
    for most in range(processor.max_patches - 1, processor.min_patches - 1, -1):
        found.append(copy.copy(processor))
        found[-1].max_patches = most
    return found


def video_tokens(frames: Sequence[Image.Image], fps: float, processor: Any, config: LlavaConfig) -> ImageTokens:
    """The model's input for RGB frames, each of which is one crop behind its number."""
    pixels = processor(list(frames), crop_to_patches=False, return_tensors="np")["pixel_values"]
    captions = tuple("\n" * (n > 0) + f"Frame{n + 1}: " for n in range(len(frames)))
    return dataclasses.replace(crops_as_tokens(pixels, config), video=True, captions=captions)


FAMILY = HostFamily(
    # The processor writes the marks around the tokens that it puts in place of what the chat template writes.
    places=ImagePlaces({"image": "<IMG_CONTEXT>", "video": "<video>"}, ("<img>", "</img>"), writes_marks=False),
    load_processor=load_processor,
    picture_tokens=picture_tokens,
    measure=measure,
    video_tokens=video_tokens,
    coarser=coarser,
)
