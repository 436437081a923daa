import json
import pathlib
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pdrop_jax.config import LlavaConfig, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.images import load_image_processor, open_image, to_crop
from pdrop_jax.inputs.resize import MAX_ASPECT

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RECORDED = json.loads((GOLDEN / "image_preprocess.json").read_text())
SHIPPED = [name for name, image in RECORDED["images"].items() if image["file"]]


def of_size(pixels):
    return LlavaConfig(vision=VisionConfig(image_size=pixels))


def clip(size):
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def expanded_to_square(image, background=(122, 116, 104)):
    side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def processed_whole(image, processor):
    return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize("name", SHIPPED)
def test_pixels_match_the_recorded_ones(name, mode, tmp_path):
    arrays = np.load(GOLDEN / "image_preprocess.npz")
    crop = to_crop(
        open_image(GOLDEN / RECORDED["images"][name]["file"]), load_image_processor(tmp_path, LlavaConfig()), mode
    )
    assert crop.dtype == np.float32
    assert crop.flags.c_contiguous
    pixels = crop.transpose(2, 0, 1)
    recorded = {key: arrays[f"{name}.{mode}.{key}"] for key in ("mean", "std", "corner_tl", "center", "blockmean28")}
    assert pixels.shape == tuple(arrays[f"{name}.{mode}.shape"])
    np.testing.assert_array_equal(pixels[:, :32, :32].astype(np.float16), recorded["corner_tl"][0])
    np.testing.assert_array_equal(pixels[:, 152:184, 152:184].astype(np.float16), recorded["center"][0])
    contiguous = np.ascontiguousarray(pixels)
    np.testing.assert_allclose(contiguous.mean((1, 2)), recorded["mean"][0], atol=1e-6)
    np.testing.assert_allclose(contiguous.std((1, 2)), recorded["std"][0], atol=1e-6)
    # numpy's float32 sums depend on the layout by 1e-5: these were recorded from a channels-last array.
    blocks = pixels.reshape(3, 12, 28, 12, 28).mean((2, 4))
    np.testing.assert_allclose(blocks, recorded["blockmean28"][0], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.sampled_from([14, 56, 98]))
def test_padding_by_strips_is_exact(width, height, size):
    image = noise(width, height)
    expected = processed_whole(expanded_to_square(image), clip(size))
    np.testing.assert_array_equal(to_crop(image, clip(size), "pad"), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_ordinary_aspects_are_cropped_by_the_processor_alone(width, height):
    if max(width, height) // min(width, height) > MAX_ASPECT:
        width = height
    image = noise(width, height)
    np.testing.assert_array_equal(to_crop(image, clip(28), "square"), processed_whole(image, clip(28)))


@pytest.mark.parametrize("size", [(2000, 10), (10, 2001), (3001, 13), (7, 1000)])
def test_extreme_aspects_are_cropped_where_the_processor_crops(size):
    short, long = sorted(size)
    line = np.linspace(0, 255, long).astype(np.uint8)
    ramp = np.tile(line, (short, 1)) if size[0] == long else np.tile(line[:, None], (1, short))
    image = Image.fromarray(ramp).convert("RGB")
    one_level = 1 / 255 / min(clip(56).image_std)
    difference = np.abs(to_crop(image, clip(56), "square") - processed_whole(image, clip(56)))
    assert difference.max() <= one_level * 1.001


@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 8000)])
def test_extreme_sizes_work_in_bounded_memory(size, mode):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crop = to_crop(open_image(Image.new("RGB", size, (255, 0, 0))), clip(56), mode)
    assert crop.shape == (56, 56, 3)
    assert np.isfinite(crop).all()
    red = np.float32((1 - clip(56).image_mean[0]) / clip(56).image_std[0])
    if mode == "square" or size == (1, 1):
        np.testing.assert_allclose(crop[..., 0], red, rtol=1e-6)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200  # MiB


def test_exif_rotation_is_honoured(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 2)) == (0, 0, 0)
    assert upright.getpixel((10, 30)) == (255, 255, 255)


def test_damaged_exif_does_no_harm(tmp_path):
    noise(8, 8).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12\x00")
    assert open_image(tmp_path / "a.jpg").size == (8, 8)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    grey = np.array([[0, 257, 32896], [65535, 128, 129]], np.uint16)
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    expected = np.array([[0, 1, 128], [255, 0, 1]])
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / f"a.{suffix}")), np.stack([expected] * 3, -1))


def test_grey_beyond_16_bits_is_refused():
    with pytest.raises(UserError, match=r"has grey values 0\.\.70000"):
        open_image(Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(UserError, match="floating-point pixels"):
        open_image(Image.fromarray(np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_common_mode_becomes_rgb(mode):
    image = noise(6, 5).convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = open_image(image)
    assert rgb.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(rgb), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_and_transparent_palette_files(tmp_path):
    noise(9, 9).convert("CMYK").save(tmp_path / "a.jpg")
    Image.new("P", (4, 4), 1).save(tmp_path / "b.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.jpg").size == (9, 9)
        assert open_image(tmp_path / "b.png").mode == "RGB"


def test_transparency_is_dropped_as_in_the_official_code():
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert open_image(image).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)])
def test_arrays_are_pictures(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = open_image(array)
    assert image.size == (5, 4)
    expected = array[..., :3] if array.ndim == 3 else array[..., None]
    np.testing.assert_array_equal(np.asarray(image), np.broadcast_to(expected, (4, 5, 3)))


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros((3, 5, 6), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4, 3), np.uint8)],
    ids=["float", "channel first", "one axis", "empty"],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(UserError, match=r"^the picture: "):
        open_image(array)


def assert_refused(path, reason):
    with pytest.raises(UserError, match=reason) as error:
        open_image(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_files_that_are_no_pictures(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jpg cannot be read: there is no such file"):
        open_image(tmp_path / "absent.jpg")
    with pytest.raises(UserError, match=f"{tmp_path} is a folder, expected a file"):
        open_image(tmp_path)
    (tmp_path / "text.png").write_text("hello\nworld")
    assert_refused(tmp_path / "text.png", "cannot be read as a picture")
    (tmp_path / "empty.png").touch()
    assert_refused(tmp_path / "empty.png", "cannot be read as a picture")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "gif", "bmp"])
def test_truncated_files(tmp_path, suffix):
    noise(60, 60).save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: len(data) // 2])
    assert_refused(path, "cannot be read as a picture: .*")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["jpg", "png", "tiff", "gif"]))
def test_damaged_files_are_read_or_refused(tmp_path_factory, seed, suffix):
    path = tmp_path_factory.mktemp("damaged") / f"a.{suffix}"
    noise(20, 20).save(path)
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    random = np.random.default_rng(seed)
    data[random.integers(0, len(data), 5)] = random.integers(0, 256, 5)
    path.write_bytes(data.tobytes())
    try:
        image = open_image(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert image.mode == "RGB"


@pytest.mark.parametrize("limit", [60, 110])
def test_decompression_bombs(tmp_path, monkeypatch, limit):
    noise(12, 10).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow warns above it and raises above its double
    assert_refused(tmp_path / "a.png", f"has more than {limit:,} pixels")


def test_processor_of_the_folder(tmp_path):
    assert load_image_processor(GOLDEN / "clip_tower", of_size(56)).crop_size.height == 56
    nested = {"image_processor": {"size": {"shortest_edge": 42}, "crop_size": 42, "image_mean": [0.5, 0.25, 0.5]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    processor = load_image_processor(tmp_path, of_size(42))
    assert tuple(processor.image_mean) == (0.5, 0.25, 0.5)
    assert to_crop(noise(50, 40), processor, "pad").shape == (42, 42, 3)


def test_processor_of_another_size_is_refused():
    with pytest.raises(UserError, match=r"makes crops of 56x56 pixels, but the vision tower takes 336x336") as error:
        load_image_processor(GOLDEN / "clip_tower", LlavaConfig())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["no json", "[]", '{"size": {"height": 56, "width": 56}, "crop_size": 56}', '{"size": 5.5, "crop_size": 3}']
)
def test_processor_that_cannot_be_used(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(UserError, match=r"image processor in|preprocessor_config\.json") as error:
        load_image_processor(tmp_path, of_size(56))
    assert "\n" not in str(error.value)


SIGLIP = LlavaConfig(VisionConfig(image_size=56, kind="siglip"))


@pytest.mark.parametrize("settings", [None, {"image_processor_type": "SiglipImageProcessor", "do_center_crop": None}])
def test_siglip_squeezes_a_picture_as_transformers_does(settings, tmp_path):
    if settings is not None:
        settings |= {"size": {"height": 56, "width": 56}, "crop_size": None}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    image = noise(90, 40)
    expected = processed_whole(image, SiglipImageProcessorPil(size={"height": 56, "width": 56}))
    np.testing.assert_array_equal(to_crop(image, load_image_processor(tmp_path, SIGLIP), "square"), expected)


def test_siglip_pads_to_a_square_as_transformers_does(tmp_path):
    settings = {"size": {"height": 56, "width": 56}, "do_center_crop": False, "do_pad": True}
    settings |= {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    image = noise(90, 40)
    expected = processed_whole(image, LlavaImageProcessorPil(**settings))
    crop = to_crop(image, load_image_processor(tmp_path, SIGLIP), "pad")
    np.testing.assert_allclose(crop, expected, atol=1e-6)


def test_siglip_of_another_size_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 42, "width": 56}}))
    with pytest.raises(UserError, match="makes crops of 56x42 pixels, but the vision tower takes 56x56"):
        load_image_processor(tmp_path, SIGLIP)


def test_works_without_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from PIL import Image\n"
        "from pdrop_jax.config import LlavaConfig, VisionConfig\n"
        "from pdrop_jax.inputs import Processor\n"
        f"folder = {str(GOLDEN.parents[1] / 'examples/tiny_tokenizer')!r}\n"
        "batch = Processor.load(folder, LlavaConfig())(['hi'], [Image.new('RGB', (5, 4))])\n"
        "assert batch.crops.shape == (1, 1, 336, 336, 3)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path)
