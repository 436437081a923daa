"""Figures of the patches kept at each stage, with dropped patches dimmed, and of the scores. Needs only Pillow."""

import io
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pdrop_jax.analysis.patches import View, views_of
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.images import Picture, open_image
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.io import check_output, write_file

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # supported file name endings
LONG_EDGE = 336  # pixels; smaller images are enlarged by an integer factor
GAP = 8  # pixels between the panels
TEXT = 14  # font size of captions, pixels
DIM = 0.2  # brightness of a dropped patch, relative
HOT = (255, 0, 0)  # colour of the largest score


Panel = tuple[Callable[[Image.Image], Image.Image], str]  # a function that paints over the image, and the caption below


def _band(image: Image.Image, panels: Sequence[Panel]) -> Image.Image:
    """``image`` once for each panel, side by side."""
    factor = max(1, LONG_EDGE // max(image.size))
    large = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    width = GAP + len(panels) * (large.width + GAP)
    canvas = Image.new("RGB", (width, GAP + large.height + TEXT + GAP + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    for number, (paint, caption) in enumerate(panels):
        left = GAP + number * (large.width + GAP)
        canvas.paste(paint(large), (left, GAP))
        draw.text((left, GAP + large.height + GAP // 2), caption, fill="black", font=font)
    return canvas


def _dimmed(stages: Sequence[tuple[np.ndarray, int]]) -> list[Panel]:
    """A panel for each stage, from the mask (rows, columns) of kept patches and the number of kept tokens."""

    def panel(mask: np.ndarray) -> Callable[[Image.Image], Image.Image]:
        # The grey base distinguishes dark patches that were kept from dark patches that were dropped.
        return lambda image: _blend(image, np.where(mask, 1.0, DIM), np.full(3, 160))

    whole = stages[0][1]
    return [(panel(mask), f"stage {n}: {count} of {whole}") for n, (mask, count) in enumerate(stages, 1)]


def _heated(heats: Sequence[np.ndarray]) -> list[Panel]:
    """A panel for each boundary, from the score of each patch (rows, columns), NaN where no token is left."""

    def panel(heat: np.ndarray) -> Callable[[Image.Image], Image.Image]:
        here = ~np.isnan(heat)
        low, high = (heat[here].min(), heat[here].max()) if here.any() else (0.0, 0.0)
        share = (np.where(here, heat, low) - low) / max(high - low, np.finfo(np.float32).tiny)
        light = np.where(here, 1 - 0.85 * share, DIM)
        return lambda image: _blend(image, light, np.where(here[..., None], HOT, 160))

    return [(panel(heat), f"scores of drop {n}") for n, heat in enumerate(heats, 1)]


def _blend(image: Image.Image, light: np.ndarray, base: np.ndarray) -> Image.Image:
    """``image`` over ``base``, a colour or one of each patch, with the share ``light`` (rows, columns) of its own."""
    rows, columns = light.shape
    y = np.arange(image.height) * rows // image.height  # the patch of each pixel row
    x = np.arange(image.width) * columns // image.width
    share = light[y][:, x][..., None]
    base = base if base.ndim == 1 else base[y][:, x]
    return Image.fromarray((np.asarray(image) * share + base * (1 - share)).round().astype(np.uint8))


def answer_picture(
    pictures: Sequence[Picture], kept: Sequence[Sequence[Sequence[int]]], processor: Processor
) -> Image.Image:
    """The kept patches of every image of one answer: a row for each image, and another for its tiles if it is tiled.

    Args:
      kept: [stage boundary][image] -> tokens, a row of ``Generation.kept``.

    Raises:
      UserError: there is no image.
    """

    def panels(number: int, view: View) -> list[Panel]:
        stages = [np.arange(len(view.cell)), *(np.array(images[number], int) for images in kept)]
        return _dimmed([view.covered(tokens) for tokens in stages])

    return _rows(pictures, processor, panels)


def score_picture(
    pictures: Sequence[Picture], scores: Sequence[Sequence[np.ndarray]], processor: Processor
) -> Image.Image:
    """Heat maps of the scores behind each drop, laid out as in ``answer_picture``; red is the largest of the image.

    Args:
      scores: [stage boundary][image] -> (n,), a row of ``Generation.scores``.

    Raises:
      UserError: there is no image, or nothing was dropped.
    """
    if not scores:
        raise UserError("there are no scores to draw: nothing is dropped by this schedule")

    def panels(number: int, view: View) -> list[Panel]:
        return _heated([view.hottest(images[number]) for images in scores])

    return _rows(pictures, processor, panels)


def _rows(pictures: Sequence[Picture], processor: Processor, panels: Callable[[int, View], list[Panel]]) -> Image.Image:
    if not pictures:
        raise UserError("there is no picture to draw the tokens of: give one, --image FILE")
    bands = []
    pictures = [crop for picture in pictures for crop in processor.with_crops(picture)]
    for number, picture in enumerate(pictures):
        image = processor.tokens(picture, alone=len(pictures) == 1)
        for view in views_of(open_image(picture), image, processor):
            bands.append(_band(view.picture, panels(number, view)))
    canvas = Image.new("RGB", (max(band.width for band in bands), sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        canvas.paste(band, (0, top))
        top += band.height
    return canvas


def save_picture(image: Image.Image, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Writes ``image`` in the format that the name ends in, one of ``PICTURES``.

    Args:
      overwrite: replace an existing file.

    Raises:
      UserError: unsupported ending, or the file must not be written, see ``io.check_output``.
      OSError: the disk is full or read-only.
    """
    target = check_output(path, overwrite=overwrite, endings=PICTURES)
    data = io.BytesIO()  # written in one piece, since encoders raise different errors on a full disk
    try:
        image.save(data, Image.registered_extensions()[pathlib.Path(path).suffix.lower()])
    except (ValueError, OSError) as error:  # a side is at most 16,383 pixels in WebP, 65,500 in JPEG
        raise UserError(f"{path}: {image.width}x{image.height} pixels cannot be written: {error}; use .png") from None
    write_file(target, data.getvalue(), overwrite)
