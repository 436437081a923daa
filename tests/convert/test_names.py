"""The tables of names: complete, without overlap, and those of real checkpoints."""

import dataclasses
import re

import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from tiny_torch import GOLDEN, VARIANTS, weights

from pdrop_jax.config import LlavaConfig, TextConfig, Tiling, VisionConfig
from pdrop_jax.convert.names import NAMINGS, TOWERS, closest, leaves, torch_shapes, unrun_shapes
from pdrop_jax.convert.sources import open_source
from pdrop_jax.model.params import abstract_params, param_specs
from pdrop_jax.schedule import DropSchedule

CONFIG = LlavaConfig(
    vision=VisionConfig(28, 14, 32, 64, 4, 4),
    text=TextConfig(71, 48, 96, 3, 4, 2, 12, qkv_bias=True, output_bias=True),
    schedule=DropSchedule((0, 2), (0.5, 0.25)),
)
TWO_LAYERS = [key for key in NAMINGS if key != "original-linear"]


@pytest.mark.parametrize("key", NAMINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_array_of_ours_has_its_own_tensors(key, tied):
    text = dataclasses.replace(CONFIG.text, tie_embeddings=tied)
    config = dataclasses.replace(CONFIG, text=text, projector_layers=1 if key == "original-linear" else 2)
    found = leaves(config, NAMINGS[key])
    shapes = {path: x.shape for path, x in flatten_dict(abstract_params(config), sep=".").items()}
    assert {leaf.path: leaf.shape for leaf in found} == shapes
    names = [name for leaf in found for name in leaf.names]
    assert len(names) == len(set(names))
    assert not set(names) & set(unrun_shapes(config, NAMINGS[key]))


def test_layers_keep_their_number_across_stages():
    names = {leaf.path: leaf.names for leaf in leaves(CONFIG, NAMINGS["hf-5-modules"])}
    scale = "model.language_model.layers.{}.input_layernorm.weight".format
    assert names["stages.0.attention_norm.scale"] == ()  # the drop at layer 0
    assert names["stages.1.attention_norm.scale"] == (scale(0), scale(1))
    assert names["stages.2.attention_norm.scale"] == (scale(2),)


@pytest.mark.parametrize("leaf", leaves(CONFIG, NAMINGS["hf"]), ids=lambda leaf: leaf.path)
def test_a_transform_and_its_inverse_are_the_identity(leaf):
    x = np.random.default_rng(0).random(leaf.transform.shape(leaf.part_shape))
    ours = leaf.transform.to_ours(x, leaf.part_shape)
    assert ours.shape == leaf.part_shape
    np.testing.assert_array_equal(leaf.transform.to_torch(ours), x)


def test_heads_and_patches_lie_where_pytorch_has_them():
    transforms = {leaf.path: leaf.transform for leaf in leaves(CONFIG, NAMINGS["hf"])}
    H = CONFIG.text.head_dim
    q = np.random.default_rng(0).random((48, 48))
    ours = transforms["stages.1.attention.q.kernel"].to_ours(q, (48, 4, H))
    assert ours[5, 3, 7] == q[3 * H + 7, 5]
    assert transforms["stages.1.attention.o.kernel"].to_ours(q, (4, H, 48))[3, 7, 5] == q[5, 3 * H + 7]
    conv = np.random.default_rng(0).random((32, 3, 14, 14))
    assert transforms["vision.embed.patch.kernel"].to_ours(conv, (14, 14, 3, 32))[1, 2, 0, 9] == conv[9, 0, 1, 2]


def shapes_of(tensors):
    return {name: tuple(x.shape) for name, x in tensors.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tables_are_those_of_transformers_5(variant, torch_model, hf_folder):
    config = open_source(hf_folder[variant]).config
    saved, modules = weights(hf_folder[variant]), torch_model[variant].state_dict()
    if config.text.tie_embeddings:
        del modules["lm_head.weight"]
    for key, tensors in (("hf-5", saved), ("hf-5-modules", modules)):
        assert torch_shapes(config, NAMINGS[key]) | unrun_shapes(config, NAMINGS[key]) == shapes_of(tensors)


@pytest.mark.parametrize("name", ["model_mha", "model_gqa"])
def test_the_table_is_that_of_the_original_code(name):
    config = open_source(GOLDEN / name).config
    naming = NAMINGS["original"]
    assert torch_shapes(config, naming) | unrun_shapes(config, naming) == shapes_of(weights(GOLDEN / name))


def test_a_tower_of_its_own_has_the_names_of_both_generations():
    config = open_source(GOLDEN / "model_mha").config
    old = load_file(GOLDEN / "clip_tower" / "model.safetensors")
    new = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig.from_pretrained(GOLDEN / "clip_tower")
    ).state_dict()
    for key, tensors in (("tower", old), ("tower-5", new)):
        assert torch_shapes(config, TOWERS[key]) | unrun_shapes(config, TOWERS[key]) == shapes_of(tensors)
        assert closest(config, tensors, TOWERS) == key


@pytest.mark.parametrize("key", TWO_LAYERS)
def test_the_format_is_told_by_its_names(key):
    names = list(torch_shapes(CONFIG, NAMINGS[key]))
    assert closest(CONFIG, names, NAMINGS) == key
    assert closest(CONFIG, names[::2], NAMINGS) == key


def test_every_row_of_a_table_is_of_a_declared_array():
    """What no model has are the biases of LLaMA's norms and mlps, which the table has rows for as it has for CLIP's."""
    siglip = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, kind="siglip"))
    tiled = dataclasses.replace(CONFIG, tiling=Tiling.next(28))
    normed = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, qk_norm=True))
    declared = {
        path for config in (CONFIG, siglip, tiled, normed) for path in flatten_dict(param_specs(config), sep=".")
    }
    rows = NAMINGS["original"].table(CONFIG)
    left = {row for row in rows if row not in {re.sub(r"^stages\.\d+", "stages", path) for path in declared}}
    mlps, norms = (
        (f"stages.mlp.{name}.bias" for name in ("gate", "up", "down")),
        ("attention_norm", "mlp_norm", "attention.q_norm", "attention.k_norm"),
    )
    assert left == {*mlps, *(f"stages.{name}.bias" for name in norms), "norm.bias"}
