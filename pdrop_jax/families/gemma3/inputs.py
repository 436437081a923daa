"""Pictures for Gemma 3, on the host: squares of one size, and with pan-and-scan further squares of long pictures.

A crop of pan-and-scan is a picture of its own: it has its own marks in the prompt, its tokens see each other both ways
and a drop counts them alone. It stands in the text behind the picture that it is cut from, with a caption in front.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.families.gemma3.config import GemmaVisionConfig
from pdrop_jax.inputs.anyres import ImageTokens, whole
from pdrop_jax.inputs.chat_template import ImagePlaces
from pdrop_jax.inputs.family import HostFamily
from pdrop_jax.inputs.image_settings import Settings, making_processor, read_settings

# transformers' processor has these where preprocessor_config.json is silent.
PAN_AND_SCAN = {
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


class GemmaSettings(Settings):
    """The keys of preprocessor_config.json that affect pixels and crops."""

    do_pan_and_scan: bool | None = None
    pan_and_scan_min_crop_size: Annotated[int, Field(ge=1, le=2**14)] | None = None
    pan_and_scan_max_num_crops: Annotated[int, Field(ge=1, le=64)] | None = None
    pan_and_scan_min_ratio_to_activate: Annotated[float, Field(ge=1, le=1e4)] | None = None
    image_seq_length: Annotated[int, Field(ge=1, le=2**16)] | None = None


def load_processor(folder: pathlib.Path, config: LlavaConfig) -> Gemma3ImageProcessorPil:
    """The image processor described in ``folder``, or Gemma 3's.

    Raises:
      UserError: the description cannot be read, or its pictures are not those of the model.
    """
    vision = config.vision
    assert isinstance(vision, GemmaVisionConfig)
    square = {"height": vision.image_size, "width": vision.image_size}
    settings = PAN_AND_SCAN | {"size": square} | read_settings(folder, GemmaSettings)
    tokens = settings.pop("image_seq_length", vision.tokens_a_side**2)
    with making_processor(folder):
        processor = Gemma3ImageProcessorPil(**settings)
    size = processor.size
    if not processor.do_resize or processor.do_center_crop or (size.height, size.width) != tuple(square.values()):
        raise UserError(
            f"the image processor in {folder} does not resize pictures to the vision tower's "
            f"{vision.image_size}x{vision.image_size} pixels: copy the preprocessor_config.json of this model"
        )
    if tokens != vision.tokens_a_side**2:
        raise UserError(
            f"the image processor in {folder} has an image_seq_length of {tokens}, but a picture is "
            f"{vision.tokens_a_side**2} tokens of this model: copy the preprocessor_config.json of this model"
        )
    return processor


def picture_tokens(image: Image.Image, processor: Any, config: LlavaConfig) -> ImageTokens:
    """An RGB image as one square."""
    found = processor(image, do_pan_and_scan=False, return_tensors="np")["pixel_values"][0]
    return whole(np.ascontiguousarray(found.transpose(1, 2, 0), np.float32), config)


def crops(image: Image.Image, processor: Any) -> list[Image.Image]:
    """The further crops of an RGB image; none unless ``processor`` has pan-and-scan on and the image is long."""
    if not cuts(processor):
        return []
    channels_first = np.asarray(image).transpose(2, 0, 1)
    found: Sequence[np.ndarray] = processor.pan_and_scan(
        channels_first, **{key: getattr(processor, key) for key in PAN_AND_SCAN}
    )
    return [Image.fromarray(np.ascontiguousarray(crop.transpose(1, 2, 0))) for crop in found]


def cuts(processor: Any) -> bool:
    """Whether pan-and-scan is on."""
    return bool(processor.do_pan_and_scan)


def with_captions(images: Sequence[ImageTokens]) -> list[ImageTokens]:
    """A picture and its crops, with the text that the processor writes in front of each; unchanged without crops."""
    if len(images) == 1:
        return list(images)
    original, first, *rest = images
    return [
        dataclasses.replace(original, captions=("Here is the original image ",)),
        dataclasses.replace(first, captions=(" and here are some crops to help you see better ",), is_crop=True),
        *(dataclasses.replace(crop, captions=(" ",), is_crop=True) for crop in rest),
    ]


FAMILY = HostFamily(
    # The processor writes the marks in place of what the chat template writes.
    places=ImagePlaces(
        {"image": "<start_of_image>"},
        ("\n\n<start_of_image>", "<end_of_image>\n\n"),
        writes_marks=False,
        reserved=("<image_soft_token>",),
    ),
    load_processor=load_processor,
    picture_tokens=picture_tokens,
    cuts=cuts,
    crops=crops,
    with_captions=with_captions,
)
