"""The messages of a request as a prompt of the library's, with their images opened.

A client's URL is either ``data:``, which contains the image, or http(s). Anything else is refused here, before it could
be taken for the path of a file of the server's.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from PIL import Image

from pdrop_jax.errors import UserError, printable
from pdrop_jax.inputs.download import DownloadRules, download, is_http_url
from pdrop_jax.inputs.encoded import decode_data_url, is_data_url
from pdrop_jax.inputs.images import Video, decode_image, image_size
from pdrop_jax.serve.protocol import ChatRequest, Frames, ImageUrl, Text


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """Attributes:
    count: largest number of images and frames of a request.
    pixels: largest number of pixels of all of them together; an image is not decoded before it is counted.
    videos: whether the model takes frames as a video; otherwise they are images.
    downloads: what may be downloaded.
    """

    count: int
    pixels: int
    videos: bool
    downloads: DownloadRules


def image_urls(request: ChatRequest, limits: ImageLimits) -> dict[str, str]:
    """Where each image of a request is, and its URL.

    Raises:
      UserError: there are too many, or a URL is neither ``data:`` nor http(s).
    """
    found = dict(_urls(request))
    if len(found) > limits.count:
        raise UserError(f"the request has {len(found)} images, but this server takes at most {limits.count}")
    for where, url in found.items():
        if not is_data_url(url) and not is_http_url(url):
            raise UserError(f"{where} is {printable(url[:40])!r}: images are data: or http(s) URLs")
    return found


def _urls(request: ChatRequest) -> Iterator[tuple[str, str]]:
    for m, message in enumerate(request.messages):
        for c, content in enumerate(message.content):
            where = f"messages.{m}.content.{c}"
            if isinstance(content, ImageUrl):
                yield where, content.image_url.url
            elif isinstance(content, Frames):
                yield from ((f"{where}.video.{number}", url) for number, url in enumerate(content.video))


def fetch(where: str, url: str, limits: ImageLimits) -> bytes:
    """The image file at a URL. Raises UserError if it is malformed, not allowed or cannot be fetched."""
    if is_data_url(url):
        return decode_data_url(url, where)
    if limits.downloads.hosts == ():
        raise UserError(f"{where} is an http(s) URL, but this server downloads nothing: send the image as a data: URL")
    return download(url, where, limits.downloads)


def open_images(files: dict[str, bytes], limits: ImageLimits) -> dict[str, Image.Image]:
    """The RGB image in each file. Raises UserError if one cannot be read or if they have too many pixels."""
    pixels = 0
    for where, content in files.items():
        try:
            height, width = image_size(content)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('the picture: ')}") from None
        pixels += height * width
        if pixels > limits.pixels:
            raise UserError(
                f"{where}: the images have {pixels:,} pixels so far, but this server takes at most {limits.pixels:,} "
                "in a request: make them smaller"
            )
    return {where: decode_image(content, where) for where, content in files.items()}


def as_prompt(request: ChatRequest, images: dict[str, Image.Image], limits: ImageLimits) -> list[dict[str, Any]]:
    """Messages as ``Engine.submit`` takes them, with the images by where they are."""

    def contents(where: str, content: Text | ImageUrl | Frames) -> list[dict[str, Any]]:
        if isinstance(content, Text):
            return [{"type": "text", "text": content.text}]
        if isinstance(content, ImageUrl):
            return [{"type": "image", "image": images[where], "mode": content.mode}]
        frames = [images[f"{where}.video.{number}"] for number in range(len(content.video))]
        if limits.videos or content.mode == "standby":  # standby tokens see the frames before theirs
            return [{"type": "video", "video": Video(frames, content.fps), "mode": content.mode}]
        return [{"type": "image", "image": frame, "mode": content.mode} for frame in frames]

    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": [
                item
                for c, content in enumerate(message.content)
                for item in contents(f"messages.{m}.content.{c}", content)
            ],
        }
        for m, message in enumerate(request.messages)
    ]
