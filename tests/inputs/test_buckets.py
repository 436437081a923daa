"""Buckets from sizes alone equal those of images that have been read."""

import dataclasses
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig, Tiling, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import ImageSize
from pdrop_jax.inputs.assemble import Row
from pdrop_jax.inputs.buckets import choose_bucket, image_bucket, smallest_bucket
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.images import Video, as_tokens, frames_as_tokens, load_image_processor, measure, open_image

TILED = LlavaConfig(vision=VisionConfig(image_size=28), tiling=Tiling.next(28))
CONFIGS = {
    "whole": dataclasses.replace(TILED, tiling=None),
    "tiled": TILED,
    "tiled alone": dataclasses.replace(TILED, tiling=dataclasses.replace(Tiling.next(28), alone=True)),
}
SIZES = st.tuples(st.integers(28, 70), st.integers(28, 70))  # not too narrow for tiles of 2 x 2 patches


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 80), st.lists(SIZES, max_size=3)), min_size=1, max_size=3))
def test_sizes_give_the_bucket_of_the_images(name, rows):
    config = CONFIGS[name]
    processor = load_image_processor(pathlib.Path("/nowhere"), config)
    texts, sizes, read = [], [], []
    for text, images in rows:
        alone = len(images) == 1
        pictures = [Image.new("RGB", size) for size in images]
        texts.append(text)
        sizes.append([measure(picture, processor, config, alone=alone) for picture in pictures])
        tokens = [as_tokens(picture, processor, config, alone=alone) for picture in pictures]
        assert [image.size for image in tokens] == sizes[-1]
        read.append(Row([1] * text + [IMAGE_PLACEHOLDER] * len(images), tokens))
    assert smallest_bucket(texts, sizes, config) == choose_bucket(read, config)


def test_a_file_is_measured_by_its_header(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), np.uint8)).save(path)
    tiler = load_image_processor(pathlib.Path("/nowhere"), TILED)
    whole = measure(np.asarray(Image.open(path)), tiler, TILED, alone=True)
    path.write_bytes(path.read_bytes()[:700])  # the pixels are gone
    with pytest.raises(UserError, match="truncated"):
        open_image(path)
    assert measure(path, tiler, TILED, alone=True) == whole == ImageSize(3, 4 + 8 + 2)
    assert measure("/absent.png", tiler, CONFIGS["whole"], alone=True) == ImageSize(1, 4)
    with pytest.raises(UserError, match=r"/absent\.png cannot be read"):
        measure("/absent.png", tiler, TILED, alone=True)


def test_frames_of_a_video_are_rounded_up_to_a_power_of_two():
    config = CONFIGS["whole"]
    processor = load_image_processor(pathlib.Path("/nowhere"), config)
    video = frames_as_tokens(Video([Image.new("RGB", (28, 28))] * 3), processor, config)
    assert video.size == ImageSize(3, 3, video=True)  # 2 x 2 features of a frame become one
    assert image_bucket(32, [[video.size]], config) == Bucket(32, (4,), 4)


def test_no_rows_and_no_images():
    assert smallest_bucket([], [], TILED) == Bucket(32)
    assert smallest_bucket([33], [[]], TILED) == Bucket(64)
