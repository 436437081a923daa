"""Damaged, huge and narrow images and other files give tokens or a one-line error, in little time and memory."""

import io
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from mutations import make_special, one_line
from PIL import Image

from pdrop_jax.config import LlavaConfig, Tiling, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.images import (
    MAX_EDGE,
    Video,
    as_tokens,
    frames_as_tokens,
    image_size,
    load_image_processor,
    open_image,
    read_image,
)

TOWER = VisionConfig(28, 14, 32, 64, 3, 4)
CONFIGS = {
    "pad": LlavaConfig(TOWER, image_aspect="pad"),
    "square": LlavaConfig(TOWER, image_aspect="square"),
    "tiled": LlavaConfig(TOWER, tiling=Tiling(((28, 56), (56, 28)))),
}
FORMATS = ["png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm", "ico", "tga"]
MIB = 2**20


def tokens(picture, name, folder):
    config = CONFIGS[name]
    return as_tokens(open_image(picture), load_image_processor(folder, config), config)


def encoded(kind, size=(23, 17), frames=1, **options):
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8)) for _ in range(frames)]
    more = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    data = io.BytesIO()
    pictures[0].save(data, kind, **more, **options)
    return data.getvalue()


def png(width, height, rows=b""):
    """A PNG whose header states this size; ``rows`` are its compressed pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def read(path, folder, what):
    """Reads a file with every image reader, which gives tokens or a one-line error. Returns the errors."""
    said = []
    for name in CONFIGS:
        with one_line((what, name)) as lines:
            assert np.isfinite(tokens(path, name, folder).crops).all()
        said += lines
    with one_line((what, "size")) as lines:
        assert min(image_size(path)) > 0
    said += lines
    assert not any("not over after" in line for line in said), what
    return said


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bits_truncation_and_other_endings(kind, tmp_path):
    data = encoded(kind)
    path = tmp_path / "a.jpg"  # the content of the file counts, not its name
    path.write_bytes(data)
    assert read(path, tmp_path, kind) == []
    random = np.random.default_rng(1)
    for cut in (1, 8, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        read(path, tmp_path, (kind, "cut", cut))
    for n in range(25):
        changed = bytearray(data)
        head = n % 2 * min(64, len(data))  # half of the bits are in the header, which has the sizes
        for at in random.integers(0, head or len(data), 1 + n % 3):
            changed[at] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        read(path, tmp_path, (kind, "flipped", n))


@pytest.mark.parametrize("kind", ["gif", "webp", "tiff", "png"])
def test_of_several_frames_the_first_is_taken(kind, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(encoded(kind, frames=4))
    with Image.open(path) as image:
        assert image.n_frames == 4
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_image(path)), expected)
    assert read(path, tmp_path, kind) == []


LIMIT = rf"pixels, but an edge may have at most {MAX_EDGE:,}: make it smaller"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((1, 60_000), rf"has 1x60000 {LIMIT}"),
        ((60_000, 1), rf"has 60000x1 {LIMIT}"),
        ((89_000_000, 1), rf"has 89000000x1 {LIMIT}"),
        ((1, 89_000_000), rf"has 1x89000000 {LIMIT}"),
        ((2**31 - 1, 2**31 - 1), "make it smaller|has more than"),
        ((40_000, 40_000), "has more than"),
    ],
)
def test_a_head_that_claims_too_much(size, words, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(*size, zlib.compress(bytes(2**16), 9)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for function in (open_image, image_size, read_image):
        with pytest.raises(UserError, match=f"{path}: {words}"):
            function(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 50 * MIB


@pytest.mark.parametrize("turned", [False, True])
def test_narrow_pictures_however_they_come(turned, tmp_path):
    """As an array, a Pillow image, a frame of a video, a file, and rotated by EXIF."""
    size = (1, MAX_EDGE + 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", size)
    picture.save(tmp_path / "a.png", exif=exif if turned else Image.Exif())
    for given in (np.asarray(picture), picture, tmp_path / "a.png", str(tmp_path / "a.png")):
        with pytest.raises(UserError, match=LIMIT):
            open_image(given)
        video = Video([Image.new("RGB", (4, 4)), given])
        with pytest.raises(UserError, match=LIMIT):
            frames_as_tokens(video, load_image_processor(tmp_path, CONFIGS["pad"]), CONFIGS["pad"])
    with pytest.raises(UserError, match=LIMIT):
        image_size(tmp_path / "a.png")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(1, MAX_EDGE), (MAX_EDGE, 1), (MAX_EDGE, 300)])
def test_the_narrowest_that_are_taken_cost_little(size, name, tmp_path):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        assert len(tokens(Image.new("RGB", size), name, tmp_path)) > 0
    except UserError as error:
        assert "too narrow: nothing of it would be left in its tiles" in str(error)  # noqa: PT017
    assert time.process_time() - began < 4  # seconds; padding to a square of 20,000 x 20,000 takes two
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200 * MIB


@pytest.mark.parametrize("function", [open_image, read_image, image_size])
@pytest.mark.parametrize("kind", ["FIFO", "device", "socket", "folder"])
def test_what_is_no_file_is_refused_at_once(function, kind, tmp_path):
    path = tmp_path / "a.png"
    make_special(kind, path)
    with one_line(kind) as said:
        function(path)
    assert said == [f"{path} is a {kind}, expected a file"]


def test_a_program_in_postscript_is_not_run(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n")
    with pytest.raises(UserError, match="is PostScript: save it as a picture"):
        open_image(path)
