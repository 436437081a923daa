"""Early compression in the tower: the identities that its first weights promise, packed views, what is refused."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny import CROP, MHA, TWO_DROPS, VISION, assert_close, forward, make_batch, params_of

from pdrop_jax.batch import Bucket
from pdrop_jax.config import MODELS, EarlyCompression, LlavaConfig, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.model import layers
from pdrop_jax.model.compression import compressed_params, with_compression
from pdrop_jax.model.compressor import compress
from pdrop_jax.model.layers import vision_attention, vision_layer, vision_mlp
from pdrop_jax.model.params import abstract_params, spec_of
from pdrop_jax.model.stacking import unstack
from pdrop_jax.model.vision import image_features, vision_features

TOWER = dataclasses.replace(VISION, num_layers=4)
PLAIN = LlavaConfig(TOWER, MHA, TWO_DROPS, select_layer=-1)
COMPRESSED = with_compression(PLAIN, EarlyCompression(1))  # 4 x 4 patches -> 2 x 2 -> one token
KINDS = ("window", "unshuffle", "average")


@functools.cache
def params(config=COMPRESSED):
    return compressed_params(config, params_of(PLAIN))


@jax.jit
def module(windows):
    """The module as it begins, on windows (P, W, 4, D)."""
    attend = functools.partial(vision_attention, TOWER, implementation="xla")
    compressor = params()["vision"]["compressor"]
    return compress(EarlyCompression(1), compressor, windows, attend, functools.partial(vision_mlp, TOWER))


def layer_k():
    return jax.tree.map(lambda x: x[1], params_of(PLAIN)["vision"]["layers"])


def test_on_equal_patches_the_module_is_layer_k():
    """Attention over equal patches gives each of them the same, and W2 W1 is then layer k's own MLP."""
    patches = np.random.default_rng(0).standard_normal((2, 3, 1, 16)).astype(np.float32)
    run = jax.jit(vision_layer, static_argnums=(0, 3))
    expected = run(TOWER, layer_k(), patches.reshape(6, 1, 16), "xla")
    assert_close(module(np.repeat(patches, 4, axis=2)), expected.reshape(2, 3, 16), atol=1e-5)


def test_on_patches_of_equal_mean_and_variance_the_mlp_is_the_mean_of_layer_ks():
    """Then LN2 over the joined channels is LN2 over each patch."""
    rng, mlp = np.random.default_rng(1), jax.jit(vision_mlp, static_argnums=0)
    numbers = rng.standard_normal(16).astype(np.float32)
    x = np.stack([rng.permutation(numbers) for _ in range(4)])
    joined = mlp(TOWER, params()["vision"]["compressor"], x.reshape(1, 1, 64))
    each = np.asarray(mlp(TOWER, layer_k(), x[None]))
    assert np.abs(each[0] - each[0].mean(0)).max() > 0.1
    assert_close(joined[0, 0], each[0].mean(0), atol=1e-5)


def test_windows_do_not_see_each_other():
    x = np.random.default_rng(2).standard_normal((1, 3, 4, 16)).astype(np.float32)
    changed = x.copy()
    changed[0, 1] += 1
    out, other = np.asarray(module(x)), np.asarray(module(changed))
    assert_close(out[0, [0, 2]], other[0, [0, 2]], atol=0)
    assert np.abs(out[0, 1] - other[0, 1]).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_packed_views_are_the_views_one_by_one(kind):
    config = with_compression(PLAIN, EarlyCompression(1, kind))
    crops = np.random.default_rng(3).standard_normal((2, 3, CROP, CROP, 3)).astype(np.float32)
    tower = jax.jit(functools.partial(image_features, config))
    packed = tower(params(config), crops).tokens
    assert packed.shape == (2, 3, 32)  # one token of each view
    for b in range(2):
        for c in range(3):
            alone = tower(params(config), crops[b : b + 1, c : c + 1]).tokens
            assert_close(alone[0, 0], packed[b, c], atol=1e-5)


def test_a_class_token_passes_the_module_unchanged():
    config = dataclasses.replace(COMPRESSED, select_layer=3)
    vision = params(config)["vision"]
    pixels = np.random.default_rng(4).standard_normal((1, CROP, CROP, 3)).astype(np.float32)
    tower = jax.jit(vision_features, static_argnums=0)
    before = tower(dataclasses.replace(PLAIN, select_layer=2), vision, pixels).tokens
    idle = jax.tree.map(np.zeros_like, vision["later_layers"])  # layers that add nothing
    after = tower(config, vision | {"later_layers": idle}, pixels).tokens
    assert after.shape == (1, 1 + 4, 16)
    assert_close(after[:, 0], before[:, 0], atol=0)


def test_the_whole_model_runs_with_a_quarter_of_the_features():
    config = with_compression(PLAIN, EarlyCompression(1), 1)
    assert config.image_tokens == 4
    batch = make_batch([[1, -4, 5, 6], [1, 7, -4, 8, 9]], Bucket(6, (4,)), image_tokens=4)
    stacked = forward(config, params(config), batch)
    assert np.isfinite(stacked.logits).all()
    assert [n.tolist() for n in stacked.lengths] == [[7, 8], [5, 6], [4, 5]]  # of 4 image tokens 2 are left, then 1
    listed = unstack(jax.tree.map(np.asarray, params(config)))  # new dicts, which it may empty
    assert isinstance(listed["vision"]["later_layers"], list)
    assert_close(forward(config, listed, batch).logits, stacked.logits, atol=1e-5)


def test_every_array_of_the_module_is_of_its_group():
    assert sorted(abstract_params(COMPRESSED)["vision"]["compressor"]) == sorted(layer_k())
    assert spec_of(COMPRESSED, "vision.compressor.mlp.up.kernel").group == "compressor"
    assert spec_of(COMPRESSED, "vision.compressor.mlp.up.kernel").shape == (64, 96)
    assert spec_of(COMPRESSED, "vision.later_layers.0.mlp.up.kernel").shape == (2, 16, 24)
    shapes = jax.tree.map(lambda x: x.shape, params())
    assert shapes == jax.tree.map(lambda x: x.shape, abstract_params(COMPRESSED))


def test_the_connector_begins_as_the_projector_of_the_mean():
    config = with_compression(PLAIN, None, 4)
    crops = np.random.default_rng(5).standard_normal((1, 1, CROP, CROP, 3)).astype(np.float32)
    joined = jax.jit(image_features, static_argnums=0)(config, params(config), crops).tokens
    x = jax.jit(vision_features, static_argnums=0)(PLAIN, params_of(PLAIN)["vision"], crops[0]).tokens
    projector = params_of(PLAIN)["projector"]
    expected = jax.jit(layers.projector)(projector, np.asarray(x)[:, 1:].mean(1, keepdims=True))
    assert_close(joined, expected, atol=1e-4)


SO400M = VisionConfig(384, 14, 1152, 4304, 27, 16, kind="siglip")
REFUSED = {
    "after layer 2 leaves no layer behind it: the vision tower runs layers 0 to 2, choose one of 0 to 1": lambda: (
        with_compression(dataclasses.replace(PLAIN, select_layer=-2), EarlyCompression(2))
    ),
    r"windows of 2 x 2 patches, but this vision tower has 27 patches a side \(384 pixels in patches of 14\)": lambda: (
        with_compression(LlavaConfig(SO400M), EarlyCompression())
    ),
    "6 patches a side cannot be merged by squares of 4 a side": lambda: with_compression(
        LlavaConfig(VisionConfig(168)), EarlyCompression(), 4
    ),
    "early compression is for CLIP, SigLIP and Qwen towers, but this model's is internvl": lambda: with_compression(
        MODELS["internvl3-8b"](), EarlyCompression()
    ),
    "a class token cannot be merged with others": lambda: with_compression(
        LlavaConfig(keep_class_token=True), EarlyCompression()
    ),
    "after layer 8 is too late: the output of layer 8 is merged too": lambda: QwenVisionConfig(
        deepstack_layers=(8, 16), early_compression=EarlyCompression(8)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_compressed_is_refused(message):
    with pytest.raises(UserError, match=message):
        REFUSED[message]()


def test_a_config_with_compression_is_read_back():
    data = COMPRESSED.to_json()
    assert data["vision"]["early_compression"] == {"after": 1, "kind": "window"}
    assert LlavaConfig.from_json(data) == COMPRESSED
    with pytest.raises(UserError, match=r"vision.early_compression.after is -1"):
        LlavaConfig.from_json(data | {"vision": data["vision"] | {"early_compression": {"after": -1}}})
