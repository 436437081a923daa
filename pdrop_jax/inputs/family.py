"""What a family beside LLaVA does on the host in its own way; each states it once, at the end of its ``inputs.py``."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from pdrop_jax.config import LlavaConfig
from pdrop_jax.inputs.anyres import ImageSize, ImageTokens
from pdrop_jax.inputs.chat_template import ImagePlaces


@dataclasses.dataclass(frozen=True)
class HostFamily:
    """Functions of a family. Images are RGB, a size is (height, width) in pixels, ``processor`` is an image processor.

    Attributes:
      places: what the chat template writes where an image stands.
      load_processor: (checkpoint folder, config) -> the image processor described there, or the family's default one.
      picture_tokens: (image, processor, config) -> the model's input for an image.
      measure: (size, processor, config) -> crops and tokens that ``picture_tokens`` makes of an image of that size;
        None if every image is one crop.
      video_tokens: (frames, frames a second, processor, config) -> the model's input for a video; None if the family
        takes no videos.
      blank: config -> a grey picture, the smallest that a model takes; None is one crop.
      cuts: processor -> whether an image may be followed by further images that are cut from it (pan-and-scan).
      crops: (image, processor) -> these further images.
      with_captions: an image and its crops -> the same, with the text that the processor writes in front of each.
      coarser: (processor, config) -> the same processor with each smaller bound on the number of tiles; none if it cuts
        no tiles.
    """

    places: ImagePlaces
    load_processor: Callable[[pathlib.Path, LlavaConfig], Any]
    picture_tokens: Callable[[Image.Image, Any, LlavaConfig], ImageTokens]
    measure: Callable[[tuple[int, int], Any, LlavaConfig], ImageSize] | None = None
    video_tokens: Callable[[Sequence[Image.Image], float, Any, LlavaConfig], ImageTokens] | None = None
    blank: Callable[[LlavaConfig], ImageTokens] | None = None
    cuts: Callable[[Any], bool] = lambda processor: False
    crops: Callable[[Image.Image, Any], list[Image.Image]] = lambda image, processor: []
    with_captions: Callable[[Sequence[ImageTokens]], list[ImageTokens]] = list
    coarser: Callable[[Any, LlavaConfig], list[Any]] = lambda processor, config: []
