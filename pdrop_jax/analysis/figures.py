"""Pictures of what stays: each image once a stage, the dropped patches dimmed. Pillow only."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.images import Picture, open_image, to_crop
from pdrop_jax.inputs.processor import Processor

LONG_EDGE = 336  # pixels; a smaller image is enlarged by a whole factor
GAP = 8  # pixels between the panels
TEXT = 14  # height of a label's letters, pixels
DIM = 0.2  # what is left of a dropped patch's brightness


def kept_picture(image: Image.Image, kept: Sequence[Sequence[int]], grid: int | tuple[int, int]) -> Image.Image:
    """``image`` as every stage sees it, side by side: whole first, then with what each drop leaves.

    Args:
      image: what the tokens cover, edge to edge; see ``as_seen``.
      kept: for each stage boundary the tokens that stay, row by row from the top left.
      grid: tokens a side, or (rows, columns).

    Raises:
      UserError: a token outside the grid.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    count = rows * columns
    stages = [range(count), *kept]
    factor = max(1, LONG_EDGE // max(image.size))
    panel = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    caption = TEXT + GAP
    width = GAP + len(stages) * (panel.width + GAP)
    canvas = Image.new("RGB", (width, GAP + panel.height + caption + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    for number, tokens in enumerate(stages, 1):
        left = GAP + (number - 1) * (panel.width + GAP)
        canvas.paste(_dimmed(panel, _mask(tokens, rows, columns)), (left, GAP))
        text = f"stage {number}: {len(tokens)} of {count}"
        draw.text((left, GAP + panel.height + GAP // 2), text, fill="black", font=font)
    return canvas


def _mask(tokens: Sequence[int], rows: int, columns: int) -> np.ndarray:
    """(rows, columns) bool, True where a token is left."""
    index = np.array(list(tokens), int)
    if len(index) and not 0 <= index.min() <= index.max() < rows * columns:
        raise UserError(f"token {index.max()} lies outside a grid of {rows}x{columns} tokens")
    mask = np.zeros(rows * columns, bool)
    mask[index] = True
    return mask.reshape(rows, columns)


def _dimmed(panel: Image.Image, mask: np.ndarray) -> Image.Image:
    rows, columns = mask.shape
    y = np.arange(panel.height) * rows // panel.height  # the patch of each line of pixels
    x = np.arange(panel.width) * columns // panel.width
    light = np.where(mask[y][:, x], 1.0, DIM)[..., None]
    # A grey base keeps a dark patch that stays apart from a dark patch that was dropped.
    pixels = np.asarray(panel) * light + 160 * (1 - light)
    return Image.fromarray(pixels.round().astype(np.uint8))


def as_seen(picture: Picture, processor: Processor) -> Image.Image:
    """The crop of ``picture`` that the vision tower takes, as a picture again: what its tokens cover.

    Raises:
      UserError: see ``inputs.images.open_image``.
    """
    settings = processor.image_processor
    crop = to_crop(open_image(picture), settings, processor.config.image_aspect)
    if settings.do_normalize:
        crop = crop * np.array(settings.image_std) + np.array(settings.image_mean)
    scale = 1 / settings.rescale_factor if settings.do_rescale else 1.0
    return Image.fromarray((crop * scale).round().clip(0, 255).astype(np.uint8))


def answer_picture(
    pictures: Sequence[Picture], kept: Sequence[Sequence[Sequence[int]]], processor: Processor
) -> Image.Image:
    """What stayed of every picture of one answer, a row for each picture.

    Args:
      kept: [stage boundary][image] -> tokens, a row of ``Generation.kept``.

    Raises:
      UserError: there is no picture.
    """
    if not pictures:
        raise UserError("there is no picture to draw the kept tokens of: give one, --image FILE")
    vision, first = processor.config.vision, int(processor.config.keep_class_token)
    side = vision.image_size // vision.patch_size
    bands = []
    for number, picture in enumerate(pictures):
        # A class token, where it is kept, is the first and covers no part of the picture.
        patches = [[token - first for token in images[number] if token >= first] for images in kept]
        bands.append(kept_picture(as_seen(picture, processor), patches, side))
    canvas = Image.new("RGB", (bands[0].width, sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        canvas.paste(band, (0, top))
        top += band.height
    return canvas


def save_picture(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes ``image`` in the format that the name ends in; ``path`` is replaced when all of it is written.

    Raises:
      UserError: Pillow writes no such format.
      OSError: the disk is full or may not be written.
    """
    path = pathlib.Path(path)
    check_picture_path(path)
    new = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        image.save(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def check_picture_path(path: pathlib.Path) -> None:
    """Raises UserError if Pillow writes no format of that ending, or there is no such folder."""
    known = {end for end, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in known:
        raise UserError(f"{path}: no picture format ends in {path.suffix!r}: use .png, .jpg or .webp")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
