"""Very long images, which must not be resized whole."""

from typing import Any

from PIL import Image

MAX_ASPECT = 64  # long edge / short edge up to which an image is resized whole before the centre crop
STRIP = 256  # rows that are padded and resized at a time


def trim(image: Image.Image) -> Image.Image:
    """Cuts off both ends of a very long image, which the centre crop would discard after resizing.

    20000x10 pixels would become 672000x336. Whole squares are cut, so the rest meets the crop's pixel grid to within a
    hundredth of a pixel. Images up to MAX_ASPECT are unchanged.
    """
    short, long = sorted(image.size)
    cut = max(0, (long // short - MAX_ASPECT + 1) // 2) * short
    left, top = (cut, 0) if image.width == long else (0, cut)
    return image.crop((left, top, image.width - left, image.height - top)) if cut else image


def pad_and_resize(image: Image.Image, processor: Any) -> Image.Image:
    """The image centred in a square of the mean colour, resized to the processor's size.

    Pillow resizes along rows first and then along columns, so rows can be padded and resized strip by strip. The result
    equals that of the whole square, but 20000x10 pixels never become 20000x20000.
    """
    size, side = processor.size.shortest_edge or processor.size.height, max(image.size)
    background = tuple(int(mean * 255) for mean in processor.image_mean)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), background)
    for y in range(0, image.height, STRIP):
        rows = min(STRIP, image.height - y)
        strip = Image.new("RGB", (side, rows), background)
        strip.paste(image.crop((0, y, image.width, y + rows)), (left, 0))
        narrow.paste(strip.resize((size, rows), processor.resample), (0, top + y))
    return narrow.resize((size, size), processor.resample)
