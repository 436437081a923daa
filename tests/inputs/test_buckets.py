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
from pdrop_jax.inputs.anyres import ImageSize, ImageTokens, levels
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import bucket_among, choose_bucket, image_bucket, prompt_buckets, smallest_bucket
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


def test_buckets_of_a_token_budget():
    """LLaVA-1.5-7B: texts without and with a picture; LLaVA-NeXT-7B: also its larger pictures."""
    found = prompt_buckets(LlavaConfig.llava_1_5_7b(), 1024)
    assert found == [*map(Bucket, (64, 256, 1024)), *(Bucket(text, (576,)) for text in (64, 256, 448))]
    tiled = prompt_buckets(LlavaConfig.llava_next_7b(), 3000)
    assert {bucket.images for bucket in tiled} == {(), (577,), (1776,), (2928,)}
    assert all(bucket.slots <= 3000 for bucket in tiled)
    assert {bucket.slots for bucket in tiled if bucket.text not in (64, 256, 1024)} == {3000}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 424), st.sampled_from([None, (28, 28), (56, 30), (30, 90)]))
def test_every_prompt_within_the_budget_has_a_bucket(text, size):
    processor = load_image_processor(pathlib.Path("/nowhere"), TILED)
    images = [as_tokens(Image.new("RGB", size), processor, TILED)] if size else []
    row = Row([1] * text + [IMAGE_PLACEHOLDER] * len(images), images)
    tokens = 0 if size is None else max(tokens for _, tokens in levels(TILED))
    buckets = prompt_buckets(TILED, text + tokens if text >= 32 else 32 + tokens)
    bucket = bucket_among(buckets, row)
    assert bucket.slots == min(b.slots for b in buckets if len(b.images) >= len(images) and _holds(b, row))


def _holds(bucket, row):
    try:
        return assemble([row], TILED, bucket) is not None
    except UserError:
        return False


def test_what_no_bucket_holds():
    image = ImageTokens(np.zeros((1, 336, 336, 3), np.float32), np.arange(576)[:, None])
    buckets = [Bucket(64), Bucket(32, (576,))]
    for row, words in (
        (Row([1] * 65), "the prompt has 65 text tokens, but the buckets hold at most 64"),
        (Row([IMAGE_PLACEHOLDER] * 2, [image] * 2), "the prompt has 2 pictures, but the buckets hold 1"),
        (
            Row([1] * 33 + [IMAGE_PLACEHOLDER], [image]),
            r"33 text tokens and pictures of \[576\] tokens in 1 crops, which",
        ),
    ):
        with pytest.raises(UserError, match=words):
            bucket_among(buckets, row)
    assert bucket_among(buckets, Row([1])) == Bucket(64)
