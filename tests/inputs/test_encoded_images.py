"""Images that are no files: bytes, file objects, data: URLs and stdin."""

import base64
import io
import os

import numpy as np
import pytest
from PIL import Image
from test_hostile_pictures import encoded, png

from pdrop_jax.config import LlavaConfig, Tiling, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.images import load_image_processor, measure, open_image

CONTENT = encoded("png")
PIXELS = np.asarray(Image.open(io.BytesIO(CONTENT)))


def data_url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def pipe_of(content):
    """The reading end of a pipe, which cannot seek."""
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return open(reading, "rb")


FORMS = {"bytes": bytes, "file object": io.BytesIO, "pipe": pipe_of, "data URL": data_url}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_picture_in_each_form(form):
    np.testing.assert_array_equal(open_image(FORMS[form](CONTENT)), PIXELS)


def test_a_file_object_may_be_read_twice_and_stays_open(tmp_path):
    (tmp_path / "a.png").write_bytes(CONTENT)
    with open(tmp_path / "a.png", "rb") as file:
        for _ in range(2):
            np.testing.assert_array_equal(open_image(file), PIXELS)
        assert not file.closed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture", "cannot be read as a picture"),
        (CONTENT[:-40], "cannot be read as a picture"),
        (b"", "cannot be read as a picture"),
        (png(19_000, 19_000), "pixels: make it smaller"),
        (png(30_000, 1), "an edge may have at most"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is PostScript"),
    ],
    ids=["text", "truncated", "empty", "bomb", "long", "postscript"],
)
def test_what_is_no_picture_is_refused_in_one_line(form, content, words):
    with pytest.raises(UserError, match=rf"^the picture: [^\n]*{words}[^\n]*$"):
        open_image(FORMS[form](content))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png,abc", "has a data: URL that is not of the form"),
        ("data:", "has a data: URL that is not of the form"),
        ("data:image/png;base64,a$b", "has an image that is not valid base64"),
    ],
)
def test_malformed_data_urls(url, words):
    with pytest.raises(UserError, match=words):
        open_image(url)


def test_tiles_are_counted_in_each_form(tmp_path):
    config = LlavaConfig(VisionConfig(28, 14, 32, 64, 3, 4), tiling=Tiling(((28, 56), (56, 28))))
    processor = load_image_processor(tmp_path, config)
    (tmp_path / "a.png").write_bytes(CONTENT)
    expected = measure(tmp_path / "a.png", processor, config, alone=True)
    for form in FORMS.values():
        assert measure(form(CONTENT), processor, config, alone=True) == expected
