"""Pictures of what stays: each image once a stage, the dropped patches dimmed. Pillow only."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageTokens, grid_shape
from pdrop_jax.inputs.images import Picture, open_image
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.storage import written_aside

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
    return _band(image, [(_mask(tokens, rows, columns), len(tokens)) for tokens in [range(count), *kept]])


def _band(image: Image.Image, stages: Sequence[tuple[np.ndarray, int]]) -> Image.Image:
    """``image`` once a stage, side by side.

    Args:
      stages: what is left at each, as a mask (rows, columns), and of how many tokens.
    """
    factor = max(1, LONG_EDGE // max(image.size))
    panel = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    caption = TEXT + GAP
    width = GAP + len(stages) * (panel.width + GAP)
    canvas = Image.new("RGB", (width, GAP + panel.height + caption + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    for number, (mask, count) in enumerate(stages, 1):
        left = GAP + (number - 1) * (panel.width + GAP)
        canvas.paste(_dimmed(panel, mask), (left, GAP))
        text = f"stage {number}: {count} of {stages[0][1]}"
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


def answer_picture(
    pictures: Sequence[Picture], kept: Sequence[Sequence[Sequence[int]]], processor: Processor
) -> Image.Image:
    """What stayed of every picture of one answer, a row for each picture; where it is tiled one more for its tiles.

    Args:
      kept: [stage boundary][image] -> tokens, a row of ``Generation.kept``.

    Raises:
      UserError: there is no picture.
    """
    if not pictures:
        raise UserError("there is no picture to draw the kept tokens of: give one, --image FILE")
    bands = []
    for number, picture in enumerate(pictures):
        image = processor.tokens(picture, alone=len(pictures) == 1)
        stages = [np.arange(len(image)), *(np.array(images[number], int) for images in kept)]
        for first, rows, columns in _panels(open_image(picture), image, processor.config):
            crops = image.crops[first : first + rows * columns]
            cells = [_cells(image.index[tokens], first, rows, columns, processor.config) for tokens in stages]
            bands.append(_band(as_seen(crops.reshape(rows, columns, *crops.shape[1:]), processor), cells))
    canvas = Image.new("RGB", (max(band.width for band in bands), sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        canvas.paste(band, (0, top))
        top += band.height
    return canvas


def _panels(picture: Image.Image, image: ImageTokens, config: LlavaConfig) -> list[tuple[int, int, int]]:
    """What is drawn of an image, as first crop and rows and columns of crops: its whole, and its tiles."""
    if config.tiling is None or len(image.crops) == 1:
        return [(0, 1, 1)]
    return [(0, 1, 1), (1, *grid_shape((picture.height, picture.width), config.tiling, config.vision.image_size))]


def _cells(index: np.ndarray, first: int, rows: int, columns: int, config: LlavaConfig) -> tuple[np.ndarray, int]:
    """Mask over the patches of some crops that tokens of features ``index`` (n, T) cover, and how many tokens do."""
    side, features = config.vision.patches_a_side, config.image_tokens
    patch = index % features - (features - side**2)  # a class token, where it is kept, covers no part of the picture
    crop = index // features - first
    here = (index >= 0) & (patch >= 0) & (crop >= 0) & (crop < rows * columns)
    mask = np.zeros((rows * columns, side**2), bool)
    mask[crop[here], patch[here]] = True
    mask = mask.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
    return mask, int(here.any(1).sum())


def as_seen(crops: np.ndarray, processor: Processor) -> Image.Image:
    """Crops (rows, columns, h, w, 3) that the vision tower takes as one picture again: what their tokens cover."""
    settings = processor.image_processor
    if settings.do_normalize:
        crops = crops * np.array(settings.image_std) + np.array(settings.image_mean)
    scale = 1 / settings.rescale_factor if settings.do_rescale else 1.0
    rows, columns, h, w, _ = crops.shape
    pixels = crops.swapaxes(1, 2).reshape(rows * h, columns * w, 3) * scale
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def save_picture(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes ``image`` in the format that the name ends in; ``path`` is replaced when all of it is written.

    Raises:
      UserError: Pillow writes no such format.
      OSError: the disk is full or may not be written.
    """
    path = pathlib.Path(path)
    check_picture_path(path)
    with written_aside(path) as new:
        image.save(new)


def check_picture_path(path: pathlib.Path) -> None:
    """Raises UserError if Pillow writes no format of that ending, or there is no such folder."""
    known = {end for end, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in known:
        raise UserError(f"{path}: no picture format ends in {path.suffix!r}: use .png, .jpg or .webp")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
