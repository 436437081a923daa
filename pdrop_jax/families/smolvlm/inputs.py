"""Pictures and videos for SmolVLM, on the host: tiles with texts between them, and the whole picture behind them.

A picture is resized to whole tiles (transformers' own processor). Each tile has its place in the grid in front of it::

    <fake_token_around_image><row_1_col_1> tile 1 <fake_token_around_image><row_1_col_2> tile 2
    <fake_token_around_image><row_2_col_1> tile 3 …

    <fake_token_around_image><global-img> the whole <fake_token_around_image>

To a drop all of them are one image. A video, which SmolVLM2 takes and Idefics3 does not, is one image too; each of its
frames is one crop behind its time.
"""

import copy
import dataclasses
import datetime
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.smolvlm.processing_smolvlm import (
    DEFAULT_CHAT_TEMPLATE,
    DEFAULT_MEDIA_OUTTRO,
    DEFAULT_VIDEO_INTRO,
    FRAME_TIMESTAMP_MESSAGE,
)

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.families.internvl.inputs import check_length, crops_as_tokens
from pdrop_jax.inputs.anyres import ImageSize, ImageTokens
from pdrop_jax.inputs.chat_template import ImagePlaces
from pdrop_jax.inputs.family import HostFamily
from pdrop_jax.inputs.image_settings import Settings, making_processor, read_settings

MARK = "<fake_token_around_image>"
WHOLE = f"{MARK}<global-img>"


class LongestEdge(BaseModel):
    """A size by its longest edge in pixels."""

    model_config = ConfigDict(extra="forbid")

    longest_edge: Annotated[int, Field(ge=1, le=4096)]


class SmolSettings(Settings):
    """The keys of preprocessor_config.json that affect pixels and tiles."""

    size: LongestEdge | None = None  # type: ignore[assignment]
    max_image_size: LongestEdge | None = None
    do_image_splitting: bool | None = None


def load_processor(folder: pathlib.Path, config: LlavaConfig) -> SmolVLMImageProcessorPil:
    """The image processor described in ``folder``, or one with up to four tiles a side.

    Raises:
      UserError: the description cannot be read, or its tiles are not those of the model.
    """
    side = config.crop_tower.image_size
    defaults = {"size": {"longest_edge": min(4 * side, 4096)}, "max_image_size": {"longest_edge": side}}
    settings = defaults | read_settings(folder, SmolSettings)
    with making_processor(folder):
        processor = SmolVLMImageProcessorPil(**settings)
    if not processor.do_resize or processor.do_center_crop or settings["max_image_size"]["longest_edge"] != side:
        raise UserError(
            f"the image processor in {folder} does not resize pictures to tiles of the vision tower's {side}x{side} "
            "pixels: copy the preprocessor_config.json of this model"
        )
    return processor


def grid_of(size: tuple[int, int], processor: Any, config: LlavaConfig) -> tuple[int, int]:
    """Rows and columns of tiles of a picture of ``size`` (height, width) pixels; one tile is the whole picture."""
    tile = config.crop_tower.image_size
    if not processor.do_image_splitting:
        return 1, 1
    no_pixels = np.broadcast_to(np.uint8(0), size)  # the function takes an array for its shape
    height, width = get_resize_output_image_size(no_pixels, processor.size.longest_edge)
    aspect = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / aspect) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * aspect) / tile)


def measure(size: tuple[int, int], processor: Any, config: LlavaConfig) -> ImageSize:
    """Crops and tokens of a picture of ``size`` (height, width) pixels. Raises UserError as ``picture_tokens``."""
    rows, columns = grid_of(size, processor, config)
    bound = f"size.longest_edge, now {processor.size.longest_edge}"
    found = check_length(size, rows * columns + (rows * columns > 1), config, bound)
    return found._replace(texts=(*captions_of(rows, columns), MARK))


def picture_tokens(image: Image.Image, processor: Any, config: LlavaConfig) -> ImageTokens:
    """The model's input for an RGB image.

    Raises:
      UserError: it has more tokens than the model has positions.
    """
    size = image.size[::-1]
    measure(size, processor, config)
    grid = grid_of(size, processor, config)
    pixels = processor(image, do_pad=True, return_tensors="np")["pixel_values"][0]
    return dataclasses.replace(crops_as_tokens(pixels, config, grid), captions=captions_of(*grid), ending=MARK)


def captions_of(rows: int, columns: int) -> tuple[str, ...]:
    """The texts in front of each tile and of the whole picture."""
    if rows * columns == 1:
        return (WHOLE,)
    places = [(row, column) for row in range(1, rows + 1) for column in range(1, columns + 1)]
    tiles = ["\n" * (column == 1 < row) + f"{MARK}<row_{row}_col_{column}>" for row, column in places]
    return (*tiles, f"\n\n{WHOLE}")


def coarser(processor: Any, config: LlavaConfig) -> list[Any]:
    """The same image processor with each smaller number of tiles along the longest edge."""
    side, found = config.crop_tower.image_size, []
    for tiles in range(math.ceil(processor.size.longest_edge / side) - 1, 0, -1):
        found.append(copy.copy(processor))
        found[-1].size = dataclasses.replace(processor.size, longest_edge=tiles * side)
    return found


def video_tokens(frames: Sequence[Image.Image], fps: float, processor: Any, config: LlavaConfig) -> ImageTokens:
    """The model's input for RGB frames, of which there are ``fps`` a second: one crop each, behind its time.

    Raises:
      UserError: num2words is not installed.
    """
    settings: dict[str, Any] = {"do_image_splitting": False, "do_pad": True, "return_tensors": "np"}
    pixels = np.concatenate([processor(frame, **settings)["pixel_values"][0] for frame in frames])
    captions = captions_of_frames(len(frames), fps)
    return dataclasses.replace(
        crops_as_tokens(pixels, config), video=True, captions=captions, ending=MARK + DEFAULT_MEDIA_OUTTRO
    )


def captions_of_frames(count: int, fps: float) -> tuple[str, ...]:
    """The texts in front of each frame, the first of which tells the number of frames and how long they take."""
    try:
        from num2words import num2words
    except ImportError:
        raise UserError(
            "videos of SmolVLM need num2words, which is not installed: pip install 'pdrop-jax[smolvlm]'"
        ) from None
    duration = str(datetime.timedelta(seconds=int(count / fps)))
    intro, found = DEFAULT_VIDEO_INTRO.format(frame_count=num2words(count), video_duration=duration), []
    for frame in range(count):
        minutes, seconds = divmod(int(frame / fps), 60)
        time = FRAME_TIMESTAMP_MESSAGE.format(timestamp=f"{minutes:02d}:{seconds:02d}")
        found.append((MARK if frame else intro) + time + WHOLE)
    return tuple(found)


FAMILY = HostFamily(
    places=ImagePlaces({"image": "<image>"}),
    load_processor=load_processor,
    picture_tokens=picture_tokens,
    measure=measure,
    coarser=coarser,
)
# SmolVLM2's own template knows no videos.
WITH_VIDEOS = dataclasses.replace(
    FAMILY,
    places=ImagePlaces({"image": "<image>", "video": "<video>"}, video_template=DEFAULT_CHAT_TEMPLATE),
    video_tokens=video_tokens,
)
