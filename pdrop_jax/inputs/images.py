"""Images: any file that Pillow reads -> RGB -> normalised crops for the vision tower."""

import contextlib
import dataclasses
import io
import math
import os
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError, one_line
from pdrop_jax.inputs.anyres import ImageSize, ImageTokens, count, grid_shape, levels, pooled, tiled, whole
from pdrop_jax.inputs.encoded import is_url, read_url
from pdrop_jax.inputs.families import FAMILIES
from pdrop_jax.inputs.image_settings import making_processor, read_settings
from pdrop_jax.inputs.resize import pad_and_resize, trim
from pdrop_jax.inputs.slices import sliced
from pdrop_jax.io import check_file
from pdrop_jax.paths import as_path, in_bucket

Encoded = str | os.PathLike | bytes | io.IOBase  # a path or a URL, or what a file holds
Picture = Encoded | Image.Image | np.ndarray
_WARNINGS = threading.Lock()  # warning filters are global to the process


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames of a video that form one image: one ``<image>`` tag, one token count at each drop.

    To drop tokens of each frame separately, pass the frames as images, with one tag each.

    Attributes:
      fps: frames a second, for models whose positions (Qwen2.5-VL) or prompts (Qwen3-VL, SmolVLM2) tell the time. Their
        own processors sample two a second, SmolVLM2's one.
    """

    frames: Sequence[Picture]
    fps: float = 2.0


Tiler: TypeAlias = LlavaNextImageProcessorPil | LlavaOnevisionImageProcessorPil
ImageProcessor: TypeAlias = Any  # one of these, or what a family's ``load_processor`` returns

SLOWEST = 1e-4  # frames a second of a video: one in nearly three hours
MAX_EDGE = 20_000  # pixels; padding makes a square of the long edge, so time grows with its square


def load_image_processor(folder: pathlib.Path, config: LlavaConfig) -> ImageProcessor:
    """The image processor described in ``folder``, or the vision tower's default if the folder describes none.

    Returns:
      A torch-free image processor of transformers. For a model with tiling it makes the tiles.

    Raises:
      UserError: the description cannot be read, is neither like CLIP's (resize the short edge, crop the centre) nor
        like SigLIP's (resize both edges), or its crops or tiles do not have the model's sizes.
    """
    if family := FAMILIES.get(config.family):
        return family.load_processor(folder, config)
    side = config.crop_tower.image_size
    square = {"height": side, "width": side}
    siglip = config.vision.kind == "siglip"
    settings = read_settings(folder) or (
        {"size": square} if siglip else {"size": {"shortest_edge": side}, "crop_size": square}
    )
    size = settings.get("size")
    both_edges = "height" in size if isinstance(size, dict) else siglip
    kind: Any = SiglipImageProcessorPil if both_edges else CLIPImageProcessorPil
    if config.tiling:
        kind = LlavaOnevisionImageProcessorPil if both_edges else LlavaNextImageProcessorPil
        points = [list(point) for point in config.tiling.pinpoints]
        if config.tiling.choice == "aspect":  # cut by ``sliced``: what a processor says of tiles is of another model
            settings["image_grid_pinpoints"] = points
        if settings.setdefault("image_grid_pinpoints", points) != points:
            raise UserError(
                f"the image processor in {folder} tiles pictures into {settings['image_grid_pinpoints']}, the model "
                f"into {points}: copy the preprocessor_config.json of this model"
            )
    with making_processor(folder):
        processor = kind.from_dict(settings)
    if both_edges:
        cuts = settings.get("do_center_crop", "crop_size" in settings)
        supported, crop = processor.do_resize and not cuts and processor.size.height, processor.size
    else:
        supported = processor.do_resize and processor.do_center_crop and processor.size.shortest_edge
        crop = processor.crop_size
    if not supported:
        raise UserError(
            f"the image processor in {folder} is not supported, expected CLIP's, with size.shortest_edge, or SigLIP's, "
            "with size.height and size.width"
        )
    if (crop.height, crop.width) != (side, side):
        raise UserError(
            f"the image processor in {folder} makes crops of {crop.width}x{crop.height} pixels, but the vision tower "
            f"takes {side}x{side}: copy the preprocessor_config.json of this model"
        )
    return processor


def open_image(picture: Picture) -> Image.Image:
    """``picture`` as an upright RGB image with 8 bits per channel.

    The alpha channel is dropped as in LLaVA's code, 16-bit grey is scaled to 8 bits, the EXIF orientation is applied.

    Args:
      picture: a path, a ``data:`` or http(s) URL, the bytes of an image file, a binary file object, a Pillow image, or
        a uint8 array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4).

    Raises:
      UserError: the file does not exist, is not an image or is truncated; the image exceeds Pillow's limit for
        untrusted images or ``MAX_EDGE``; or an array has another shape or dtype.
    """
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which does not affect the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return read_image(picture)


def read_image(picture: Picture) -> Image.Image:
    """``open_image`` for many threads at once: it leaves the warning filters alone, which are global to the process."""
    if isinstance(picture, Encoded):
        with _opened(picture) as image:
            return _to_rgb(image)
    with _one_line_errors("the picture"):
        return _to_rgb(_from_array(picture) if isinstance(picture, np.ndarray) else picture)


def image_size(file: Encoded) -> tuple[int, int]:
    """(height, width) in pixels of the upright image in a file, or in what a file holds. Only the header is read.

    Raises:
      UserError: the image cannot be read or is too large.
    """
    with _opened(file) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size if turned else image.size[::-1]


def decode_image(content: bytes, name: str) -> Image.Image:
    """The RGB image in the bytes of a file. UserError, which starts with ``name``, as ``read_image`` raises it."""
    with _decoded(io.BytesIO(content), name) as image:
        return _to_rgb(image)


@contextlib.contextmanager
def _opened(file: Encoded) -> Iterator[Image.Image]:
    """An image whose header has been read and whose size is within the limits."""
    if isinstance(file, str) and is_url(file):
        file = read_url(file, "the picture")
    if isinstance(file, bytes | io.IOBase):
        opened = _decoded(io.BytesIO(file) if isinstance(file, bytes) else file, "the picture")
    else:
        check_file(file)
        opened = _decoded(as_path(file).open("rb") if in_bucket(file) else file, str(file))
    with opened as image:
        yield image


@contextlib.contextmanager
def _decoded(file: Any, name: str) -> Iterator[Image.Image]:
    with _one_line_errors(name), Image.open(file) as image:
        if image.format == "EPS":  # a program, which Pillow would execute
            raise UserError("is PostScript: save it as a picture")
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        _check_edges(image.size)
        yield image


@contextlib.contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Turns any error about an image into a UserError of one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{name}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller") from None
    except UnidentifiedImageError:  # which would name an object in memory
        raise UserError(f"{name}: cannot be read as a picture: its format is not recognised") from None
    except Exception as error:  # Pillow's decoders raise almost anything on a damaged file
        raise UserError(f"{name}: cannot be read as a picture: {one_line(error)}") from None


def _check_edges(size: tuple[int, int]) -> None:
    if max(size) > MAX_EDGE:
        raise UserError(f"has {size[0]}x{size[1]} pixels, but an edge may have at most {MAX_EDGE:,}: make it smaller")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UserError(
            f"an array of {array.dtype} {array.shape} is no picture: expected uint8 (h, w), (h, w, 1), (h, w, 3) or "
            "(h, w, 4)"
        )
    _check_edges((array.shape[1], array.shape[0]))
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise UserError(f"has {image.width}x{image.height} pixels: both edges must be at least 1")
    _check_edges(image.size)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey_to_8_bits(image)
    if image.mode == "F":
        raise UserError("has floating-point pixels of unknown range: save it with 8 or 16 bits a channel")
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255, so nearly every 16-bit image would come out white.
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise UserError(f"has grey values {grey.min()}..{grey.max()}: save it with 8 or 16 bits a channel")
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))


def measure(picture: Picture, processor: ImageProcessor, config: LlavaConfig, *, alone: bool) -> ImageSize:
    """The number of crops and tokens that ``as_tokens`` makes of an image. At most the header of a file is read.

    Args:
      processor: from ``load_image_processor``.
      alone: whether its row has no other image.

    Raises:
      UserError: the image cannot be read or is too narrow to be tiled, or pan-and-scan is on, which needs the pixels.
    """
    return measure_size(lambda: picture_size(picture), processor, config, alone=alone)


def picture_size(picture: Picture) -> tuple[int, int]:
    """(height, width) in pixels; of a file at most the header is read."""
    return image_size(picture) if isinstance(picture, Encoded) else open_image(picture).size[::-1]


def measure_size(
    size: Callable[[], tuple[int, int]], processor: ImageProcessor, config: LlavaConfig, *, alone: bool
) -> ImageSize:
    """``measure`` by the function ``size``, (height, width) in pixels, which is called only if that matters."""
    check_no_crops(processor, config)
    family = FAMILIES.get(config.family)
    if family and family.measure:
        return family.measure(size(), processor, config)
    if config.tiling is None or (config.tiling.alone and not alone):
        return ImageSize(*levels(config)[0])
    return ImageSize(*count(size(), config))


def check_no_crops(processor: ImageProcessor, config: LlavaConfig) -> None:
    """Raises UserError if a picture may become several, which data sets and questions in files cannot have."""
    family = FAMILIES.get(config.family)
    if family and family.cuts(processor):
        raise UserError(
            "pan-and-scan is for prompts only, but a data set takes each picture as one: set do_pan_and_scan to false "
            "in preprocessor_config.json"
        )


def as_tokens(image: Image.Image, processor: ImageProcessor, config: LlavaConfig, *, alone: bool = True) -> ImageTokens:
    """The model's input for an RGB image: its crops, and how their features become tokens.

    Args:
      processor: from ``load_image_processor``.
      alone: whether its row has no other image.

    Raises:
      UserError: the image is too narrow to be tiled.
    """
    if family := FAMILIES.get(config.family):
        return family.picture_tokens(image, processor, config)
    if config.tiling is None:
        return whole(to_crop(image, processor, config.image_aspect), config)
    if config.tiling.alone and not alone:
        return whole(to_crop(image, plain(processor), "pad"), config)
    if config.tiling.choice == "aspect":
        grid = grid_shape(image.size[::-1], config.tiling, config.crop_tower.image_size)
        return tiled(sliced(image, processor, config.crop_tower.image_size, grid), image.size[::-1], config)
    pixels: Any = processor(image, return_tensors="np")["pixel_values"][0]  # (P, 3, h, w), the whole first
    return tiled(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1), np.float32), image.size[::-1], config)


def blank(config: LlavaConfig, parts: int = 1) -> ImageTokens:
    """A grey picture, the smallest that a model takes; in several ``parts`` it has one token in each."""
    family = FAMILIES.get(config.family)
    image = family.blank(config) if family and family.blank else None
    image = image or whole(np.zeros(config.vision.crop_shape, np.float32), config)
    if parts == 1:
        return image
    return dataclasses.replace(image, index=np.repeat(image.index[:1], parts, axis=0), captions=("",) * parts)


def frames_as_tokens(video: Video, processor: ImageProcessor, config: LlavaConfig) -> ImageTokens:
    """The model's input for a video: its frames are never tiled, and their features are downsampled.

    Raises:
      UserError: there is no frame, ``fps`` is out of range, or a frame cannot be read or has another size.
    """
    if not video.frames:
        raise UserError("a video needs at least one frame, got none")
    if not SLOWEST <= video.fps < math.inf:
        raise UserError(f"a video has {video.fps} frames a second: it must be {SLOWEST} or more")
    if family := FAMILIES.get(config.family):
        if family.video_tokens is None:
            raise UserError(f"a {config.family} model takes no videos: pass the frames as pictures")
        return family.video_tokens([open_image(frame) for frame in video.frames], video.fps, processor, config)
    aspect = "square" if config.tiling else config.image_aspect
    own = plain(processor)
    return pooled(np.stack([to_crop(open_image(frame), own, aspect) for frame in video.frames]), config)


def plain(processor: Any) -> ImageProcessor:
    """A processor without tiling, with the size and normalisation of ``processor``."""
    names = ["size", "resample", "rescale_factor", "image_mean", "image_std"]
    kind: Any = SiglipImageProcessorPil
    if processor.do_center_crop:
        kind, names = CLIPImageProcessorPil, [*names, "crop_size"]
    return kind(**{name: getattr(processor, name) for name in names})


def to_crop(image: Image.Image, processor: ImageProcessor, aspect: Literal["square", "pad"]) -> np.ndarray:
    """The model's input for an image without tiling.

    Args:
      image: RGB.
      aspect: "square" resizes the short edge and crops the centre, or resizes both edges with SigLIP's processor;
        "pad" first pads the image to a square with the mean colour.

    Returns:
      (h, w, 3) float32, normalised.
    """
    if aspect == "pad":
        image = pad_and_resize(image, processor)
    elif processor.do_center_crop:
        image = trim(image)
    pixels: Any = processor(image, return_tensors="np")["pixel_values"][0]
    return np.ascontiguousarray(pixels.transpose(1, 2, 0), np.float32)
