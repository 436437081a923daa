"""Pictures of any size for Qwen's tower, on the host: patches in windows, and where their tokens stand.

A picture becomes a grid of patches (transformers' own processor), and every square of ``merge_size`` patches a side one
token. Patches are stored window by window, in windows of one size whose cells at the picture's edges may be empty::

    tokens of a grid    0 1 2      windows of 2 x 2 cells     0 1 | 2 .
                        3 4 5                                 3 4 | 5 .
"""

import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.inputs.anyres import ImageSize, ImageTokens
from pdrop_jax.inputs.chat_template import ImagePlaces
from pdrop_jax.inputs.family import HostFamily
from pdrop_jax.inputs.image_settings import Deviation, Mean, making_processor, read_settings

Area = Annotated[int, Field(ge=1, le=2**26)]  # pixels of a picture


class Size(BaseModel):
    """Bounds of a picture's area in pixels; the names are those of other processors' edges."""

    model_config = ConfigDict(extra="forbid")

    shortest_edge: Area | None = None
    longest_edge: Area | None = None


class Settings(BaseModel):
    """The keys of preprocessor_config.json that affect pixels and grids."""

    model_config = ConfigDict(extra="ignore")

    do_resize: bool | None = None
    size: Size | None = None
    min_pixels: Area | None = None
    max_pixels: Area | None = None
    resample: Annotated[int, Field(ge=0, le=5)] | None = None  # PIL.Image.Resampling
    do_rescale: bool | None = None
    rescale_factor: Annotated[float, Field(gt=0, le=255)] | None = None
    do_normalize: bool | None = None
    image_mean: tuple[Mean, Mean, Mean] | None = None
    image_std: tuple[Deviation, Deviation, Deviation] | None = None
    do_convert_rgb: bool | None = None
    patch_size: Annotated[int, Field(ge=1, le=2**14)] | None = None
    temporal_patch_size: Annotated[int, Field(ge=1, le=64)] | None = None
    merge_size: Annotated[int, Field(ge=1, le=64)] | None = None


def load_processor(folder: pathlib.Path, config: LlavaConfig) -> Qwen2VLImageProcessorPil:
    """The image processor described in ``folder``, or transformers' default one.

    Raises:
      UserError: the description cannot be read, or its patches are not those of the model.
    """
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    settings = read_settings(folder, Settings)
    for key in ("patch_size", "temporal_patch_size", "merge_size"):
        expected = getattr(vision, key)
        if settings.setdefault(key, expected) != expected:
            raise UserError(
                f"the image processor in {folder} has {key} {settings[key]}, but the vision tower has {expected}: copy "
                "the preprocessor_config.json of this model"
            )
    # With early compression a token is made of more patches than the released processor's.
    settings["merge_size"] = vision.token_side
    with making_processor(folder):
        processor = Qwen2VLImageProcessorPil(**settings)
    low, high = processor.size.shortest_edge, processor.size.longest_edge
    if not low or not high or low > high:
        raise UserError(
            f"the image processor in {folder} resizes pictures to {low} to {high} pixels: size.shortest_edge "
            "(min_pixels) must not be above size.longest_edge (max_pixels)"
        )
    return processor


def picture_tokens(image: Image.Image, processor: Qwen2VLImageProcessorPil, config: LlavaConfig) -> ImageTokens:
    """The model's input for an RGB image.

    Raises:
      UserError: it is too narrow, or has more tokens than the model has positions.
    """
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    grid_of(image.size[::-1], processor, config)
    found = processor(image, return_tensors="np")
    return lay_out(np.asarray(found["pixel_values"], np.float32), tuple(found["image_grid_thw"][0].tolist()), vision)


def video_tokens(
    frames: Sequence[Image.Image], fps: float, processor: Qwen2VLImageProcessorPil, config: LlavaConfig
) -> ImageTokens:
    """The model's input for RGB frames: a patch covers ``temporal_patch_size`` of them; the last one fills the rest.

    Frames are resized within the bounds of pictures.

    Raises:
      UserError: the frames differ in size, or a frame does not fit, see ``picture_tokens``.
    """
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        shown = " and ".join(f"{width}x{height}" for width, height in sizes[:2])
        raise UserError(f"the frames of a video have {shown} pixels: resize them to one size")
    rows, columns = grid_of(sizes[0][::-1], processor, config)
    depth = vision.temporal_patch_size
    frames = [*frames, *[frames[-1]] * (-len(frames) % depth)]
    # The processor repeats a picture along the temporal axis of its patches: a frame's own place is kept of each.
    read = [np.asarray(processor(frame, return_tensors="np")["pixel_values"], np.float32) for frame in frames]
    parts = [patches.reshape(rows * columns, 3, depth, -1)[:, :, n % depth] for n, patches in enumerate(read)]
    steps = [np.stack(parts[n : n + depth], axis=2) for n in range(0, len(parts), depth)]
    patches = np.concatenate(steps).reshape(len(steps) * rows * columns, -1)
    return lay_out(patches, (len(steps), rows, columns), vision, seconds=depth / fps)


def grid_of(size: tuple[int, int], processor: Any, config: LlavaConfig) -> tuple[int, int]:
    """Rows and columns of patches of a picture of ``size`` (height, width) pixels.

    Raises:
      UserError: see ``picture_tokens``.
    """
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    height, width = size
    if processor.do_resize:
        low, high = processor.size.shortest_edge, processor.size.longest_edge
        try:
            height, width = smart_resize(height, width, vision.cell, low, high)
        except ValueError:
            raise UserError(
                f"a picture of {width}x{height} pixels is too narrow: its long edge may be 200 times the short one"
            ) from None
    elif min(size) < vision.cell or height % vision.cell or width % vision.cell:
        raise UserError(
            f"a picture of {width}x{height} pixels is not made of tokens of {vision.cell} pixels a side, and the image "
            "processor does not resize: set do_resize in preprocessor_config.json"
        )
    tokens = height * width // vision.cell**2
    if tokens > config.text.max_length:
        raise UserError(
            f"a picture of {size[1]}x{size[0]} pixels becomes {tokens} tokens, but the model has "
            f"{config.text.max_length} positions: lower size.longest_edge (max_pixels, "
            f"now {processor.size.longest_edge}) in preprocessor_config.json"
        )
    return height // vision.patch_size, width // vision.patch_size


def measure(size: tuple[int, int], processor: Any, config: LlavaConfig) -> ImageSize:
    """Windows and tokens of a picture of ``size`` (height, width) pixels. Raises UserError as ``picture_tokens``."""
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    rows, columns = (n // vision.token_side for n in grid_of(size, processor, config))
    return ImageSize(-(-rows // vision.window_side) * -(-columns // vision.window_side), rows * columns)


def lay_out(
    patches: np.ndarray, grid: tuple[int, int, int], config: QwenVisionConfig, seconds: float | None = None
) -> ImageTokens:
    """A picture or a video of ``grid`` (frames, rows, columns) patches.

    Args:
      patches: (n, F) float32 in transformers' order: frames, rows and columns of tokens, then the patches of a token.
      seconds: of a video, the time between two of its steps.
    """
    frames, rows, columns = grid[0], grid[1] // config.token_side, grid[2] // config.token_side
    t, i, j = (x.reshape(-1) for x in np.meshgrid(*map(np.arange, (frames, rows, columns)), indexing="ij"))
    side, token = config.window_side, config.token_side
    high, wide = -(-rows // side), -(-columns // side)
    window = (t * high + i // side) * wide + j // side
    index = window * config.window_tokens + i % side * side + j % side  # (n,)

    windows, cells = frames * high * wide, config.window_tokens
    inside = order_inside(config)
    crops = np.zeros((windows * cells, token**2, config.patch_values), np.float32)
    crops[index] = patches.reshape(len(index), token**2, -1)[:, inside]
    layout = np.zeros((windows * cells, token**2, config.layout_values), np.int32)
    layout[index, :, 0] = i[:, None] * token + inside // token
    layout[index, :, 1] = j[:, None] * token + inside % token
    layout[index, :, 2] = t[:, None] + 1
    layout[index, :, 3:] = grid[1:][: config.layout_values - 3]

    pace = np.float32(1)
    if seconds is not None and config.tokens_per_second is not None:
        pace = np.float32(config.tokens_per_second) * np.float32(seconds)  # rounded as transformers does
    return ImageTokens(
        crops.reshape(windows, config.window_patches, -1),
        index.astype(np.int32)[:, None],
        video=seconds is not None,
        layout=layout.reshape(windows, config.window_patches, -1),
        positions=np.stack([(t.astype(np.float32) * pace).astype(np.int32), i, j], axis=-1).astype(np.int32),
        extent=max(rows, columns),
    )


def order_inside(config: QwenVisionConfig) -> np.ndarray:
    """The patches of a token (n,), counted line by line, in the order in which the tower takes them.

    With early compression those that become one patch follow each other, so that the merger finds its squares again::

         0  1  2  3
         4  5  6  7      0 1 4 5   2 3 6 7   8 9 12 13   10 11 14 15
        …
    """
    merge, each = config.merge_size, config.token_side // config.merge_size
    lines = np.arange(config.token_side**2).reshape(merge, each, merge, each)
    return lines.swapaxes(1, 2).reshape(-1)


def blank(config: LlavaConfig) -> ImageTokens:
    """A grey picture of one token."""
    vision = config.vision
    assert isinstance(vision, QwenVisionConfig)
    patches = np.zeros((vision.token_side**2, vision.patch_values), np.float32)
    return lay_out(patches, (1, vision.token_side, vision.token_side), vision)


FAMILY = HostFamily(
    places=ImagePlaces({"image": "<|image_pad|>", "video": "<|video_pad|>"}, ("<|vision_start|>", "<|vision_end|>")),
    load_processor=load_processor,
    picture_tokens=picture_tokens,
    measure=measure,
    video_tokens=video_tokens,
    blank=blank,
)
