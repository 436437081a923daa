"""Conversion: every naming and kind of file gives the same arrays, bit by bit, and PyTorch's logits."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny_torch import GOLDEN, VARIANTS, assert_same, edit_json, rewrite, tiny_llava, weights

from pdrop_jax import checkpoint
from pdrop_jax.convert.check import compare
from pdrop_jax.convert.importer import convert
from pdrop_jax.convert.names import NAMINGS, torch_shapes, unrun_shapes
from pdrop_jax.convert.sources import open_source
from pdrop_jax.schedule import DropSchedule

PROCESSOR = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}, "do_pad": True}


def arrays_of(folder, **kwargs):
    _, params = checkpoint.load(folder, **kwargs)
    return {name: np.asarray(x) for name, x in flatten_dict(params, sep=".").items()}


def converted(source, out, **kwargs):
    convert(source, out, **kwargs)
    return arrays_of(out)


def renamed(folder, key):
    """The checkpoint's tensors under the names of ``NAMINGS[key]``."""
    config, naming = open_source(folder).config, NAMINGS[key]
    old = torch_shapes(config, NAMINGS["hf-5"]) | unrun_shapes(config, NAMINGS["hf-5"])
    new = torch_shapes(config, naming) | unrun_shapes(config, naming)
    names = dict(zip(old, new, strict=True))
    return {names[name]: x for name, x in weights(folder).items()}


def bits(x):
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == ml_dtypes.bfloat16 else torch.tensor(x)


@pytest.mark.parametrize("key", ["hf", "hf-5", "hf-modules", "hf-5-modules"])
def test_every_naming_gives_the_same_arrays(key, hf, tmp_path):
    expected = converted(hf, tmp_path / "expected")
    tensors = renamed(hf, key)
    rewrite(hf, lambda _: tensors)
    assert_same(converted(hf, tmp_path / "out"), expected)


def test_arrays_are_those_of_the_torch_model(torch_model, hf_folder, tmp_path):
    found = converted(hf_folder["gqa"], tmp_path / "out", schedule=DropSchedule((1,), (0.5,)))
    model = torch_model["gqa"].model
    layers, tower = model.language_model.layers, model.vision_tower
    k = layers[2].self_attn.k_proj.weight.detach().numpy()  # (K * H, D)
    np.testing.assert_array_equal(found["stages.1.attention.k.kernel"][1], k.T.reshape(48, 2, 16))
    o = layers[0].self_attn.o_proj.weight.detach().numpy()  # (D, N * H)
    np.testing.assert_array_equal(found["stages.0.attention.o.kernel"][0], o.T.reshape(4, 16, 48))
    patch = tower.embeddings.patch_embedding.weight.detach().numpy()
    np.testing.assert_array_equal(found["vision.embed.patch.kernel"], patch.transpose(2, 3, 1, 0))
    assert len(found["vision.layers.mlp_norm.scale"]) == 3  # of 4, the last never runs


@pytest.mark.parametrize("kind", ["sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_file_gives_the_same_arrays(kind, dtype, hf, tmp_path):
    tensors = {
        name: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else x.dtype) for name, x in weights(hf).items()
    }
    rewrite(hf, lambda _: tensors)
    expected = converted(hf, tmp_path / "expected")
    (hf / "model.safetensors").unlink()
    names = sorted(tensors)
    if kind == "bin":
        torch.save({name: bits(x) for name, x in tensors.items()}, hf / "pytorch_model.bin")
    else:
        whole = "model.safetensors" if "safetensors" in kind else "pytorch_model.bin"
        stem, suffix = whole.split(".")
        weight_map = {}
        for n, part in enumerate((names[::2], names[1::2]), 1):
            file = f"{stem}-0000{n}-of-00002.{suffix}"
            if suffix == "bin":
                torch.save({name: bits(tensors[name]) for name in part}, hf / file)
            else:
                save_file({name: tensors[name] for name in part}, hf / file)
            weight_map |= dict.fromkeys(part, file)
        (hf / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = converted(hf, tmp_path / "out")
    assert found["norm.scale"].dtype == dtype
    assert_same(found, expected)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "mha"])
def test_logits_are_those_of_transformers(variant, hf_folder, tmp_path):
    convert(hf_folder[variant], tmp_path / "out")
    difference, largest = compare(open_source(hf_folder[variant]), tmp_path / "out")
    assert largest > 1
    assert difference < 1e-4


def test_logits_of_an_original_checkpoint_are_those_of_transformers(tmp_path):
    convert(GOLDEN / "model_mha", tmp_path / "out")
    difference, largest = compare(open_source(GOLDEN / "model_mha"), tmp_path / "out")
    assert largest > 1
    assert difference < 1e-4


@pytest.mark.parametrize("variant", ["mistral", "llama"])
def test_an_original_llava_next_of_another_language_model(variant, tmp_path):
    """Arrays and config of a Mistral and of a Llama 3 are those that the same model has in Hugging Face's format."""
    own = {
        "mistral": {"sliding_window": None},
        "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    }[variant]
    model = tiny_llava(kind="llava_next", model_type=variant, num_key_value_heads=2, **own)
    model.save_pretrained(tmp_path / "hf")
    expected = convert(tmp_path / "hf", tmp_path / "expected").config
    model.config.vision_config.save_pretrained(tmp_path / "clip_tower")
    original = {
        "model_type": f"llava_{variant}",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [point[::-1] for point in model.config.image_grid_pinpoints],  # width, height
        "mm_hidden_size": 32,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip_tower",
        "rope_theta": expected.text.rope_theta,
    }
    text = model.config.text_config.to_dict()
    del text["rope_parameters"]  # a name of later days
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text(json.dumps(text | original))
    save_file(renamed(tmp_path / "hf", "original"), tmp_path / "original" / "model.safetensors")
    found = convert(tmp_path / "original", tmp_path / "out").config
    tiling = dataclasses.replace(expected.tiling, rounded=False)
    assert found == dataclasses.replace(expected, tiling=tiling, image_aspect="pad", image_token_id=None)
    assert_same(arrays_of(tmp_path / "out"), arrays_of(tmp_path / "expected"))


def test_the_check_would_notice(hf, tmp_path):
    convert(hf, tmp_path / "out")
    rewrite(
        hf, lambda tensors: tensors | {"vision_tower.pre_layrnorm.bias": tensors["vision_tower.pre_layrnorm.bias"] + 1}
    )
    difference, _ = compare(open_source(hf), tmp_path / "out")
    assert difference > 1e-3


def without_tower(tensors):
    return {name: x for name, x in tensors.items() if "vision_tower" not in name}


def test_a_tower_of_its_own_is_found_by_its_name(original, tmp_path):
    expected = converted(original, tmp_path / "expected")
    rewrite(original, without_tower)
    assert_same(converted(original, tmp_path / "out"), expected)
    inside = shutil.move(tmp_path / "clip_tower", original / "clip_tower")
    assert_same(converted(original, tmp_path / "out2"), expected)
    shutil.move(inside, tmp_path / "elsewhere")
    assert_same(converted(original, tmp_path / "out3", vision=tmp_path / "elsewhere"), expected)


@pytest.mark.parametrize("kind", [transformers.CLIPVisionModel, transformers.CLIPModel])
def test_a_tower_may_be_half_of_a_clip(kind, original, tmp_path):
    expected = converted(original, tmp_path / "expected")
    rewrite(original, without_tower)
    vision = transformers.CLIPVisionConfig.from_pretrained(tmp_path / "clip_tower")
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip_tower")
    if kind is transformers.CLIPModel:
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        text |= {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
        whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision.to_dict()))
        whole.vision_model.load_state_dict(tower.state_dict())
        tower = whole
    tower.save_pretrained(tmp_path / "clip")
    assert_same(converted(original, tmp_path / "out", vision=tmp_path / "clip"), expected)


def test_the_checkpoints_own_tower_wins(original, tmp_path):
    expected = converted(original, tmp_path / "expected")
    rewrite(tmp_path / "clip_tower", lambda tensors: {name: x + 1 for name, x in tensors.items()})
    assert_same(converted(original, tmp_path / "out"), expected)


def test_a_projector_may_have_a_file_of_its_own(original, tmp_path):
    expected = converted(original, tmp_path / "expected")
    tensors = {name: x for name, x in weights(original).items() if name.startswith("model.mm_projector.")}
    assert len(tensors) == 4
    torch.save({name: torch.tensor(x) for name, x in tensors.items()}, original / "mm_projector.bin")
    rewrite(original, lambda old: {name: x for name, x in old.items() if name not in tensors})
    assert_same(converted(original, tmp_path / "out"), expected)


def test_a_linear_projector(original, tmp_path):
    edit_json(original / "config.json", mm_projector_type="linear")
    weight = np.random.default_rng(0).random((64, 32), np.float32)
    bias = np.zeros(64, np.float32)
    rest = {name: x for name, x in weights(original).items() if "mm_projector" not in name}
    rewrite(original, lambda _: rest | {"model.mm_projector.weight": weight, "model.mm_projector.bias": bias})
    found = converted(original, tmp_path / "out")
    np.testing.assert_array_equal(found["projector.linear_0.kernel"], weight.T)
    assert "projector.linear_1.kernel" not in found


def test_tensors_that_no_model_has_are_left_behind(hf_folder, tmp_path):
    hf = shutil.copytree(hf_folder["tied"], tmp_path / "hf")
    expected = converted(hf, tmp_path / "expected")
    extra = {
        "language_model.model.layers.1.self_attn.rotary_emb.inv_freq": np.zeros(6, np.float32),
        "vision_tower.embeddings.position_ids": np.arange(5),
        "language_model.lm_head.weight": np.zeros((71, 48), np.float32),
    }
    rewrite(hf, lambda tensors: tensors | extra)
    assert_same(converted(hf, tmp_path / "out"), expected)


def test_tensors_that_never_run_travel_along(hf_folder, tmp_path):
    convert(hf_folder["gqa"], tmp_path / "out")
    found = load_file(tmp_path / "out" / "unused.safetensors")
    source, prefix = weights(hf_folder["gqa"]), "vision_tower."
    names = [name for name in source if "encoder.layers.3." in name or "post_layernorm" in name]
    assert_same(found, {name.removeprefix(prefix): source[name] for name in names})


def test_a_tower_without_its_last_layer_is_enough(hf, tmp_path):
    expected = converted(hf, tmp_path / "expected")
    rewrite(hf, lambda tensors: {name: x for name, x in tensors.items() if "tower.encoder.layers.3." not in name})
    assert_same(converted(hf, tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (np.float32, None, "float32"),
        (np.float32, "bfloat16", "bfloat16"),
        (np.float16, None, "bfloat16"),
        (np.float16, "float32", "float32"),
        (ml_dtypes.bfloat16, None, "bfloat16"),
        (ml_dtypes.bfloat16, "float32", "float32"),
    ],
)
def test_dtypes(stored, asked, expected, hf, tmp_path):
    rewrite(hf, lambda tensors: {name: x.astype(stored) for name, x in tensors.items()})
    found = converted(hf, tmp_path / "out", dtype=asked)
    assert {x.dtype.name for x in found.values()} == {expected}
    embedding = weights(hf)["language_model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(found["embed.embedding"], embedding.astype(expected))


def test_the_schedule_goes_into_the_checkpoint(hf_folder, tmp_path):
    dense = convert(hf_folder["gqa"], tmp_path / "dense")
    assert not dense.config.schedule.layers
    schedule = DropSchedule((0, 2), (0.5, 0.1), "dense")
    summary = convert(hf_folder["gqa"], tmp_path / "drops", schedule=schedule)
    config, params = checkpoint.load(tmp_path / "drops")
    assert summary.config.schedule == config.schedule == schedule
    assert [params["stages"][s]["mlp_norm"]["scale"].shape[0] for s in "012"] == [0, 2, 1]
    moved = arrays_of(tmp_path / "drops", schedule=DropSchedule.none())
    assert_same(moved, arrays_of(tmp_path / "dense"))


def test_files_travel_along(hf, tmp_path):
    names = ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
    for name in names:
        (hf / name).write_text("{}")
    (hf / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (hf / "README.md").write_text("no part of the model")
    summary = convert(hf, tmp_path / "out")
    assert summary.has_tokenizer
    found = {path.name for path in (tmp_path / "out").iterdir()}
    arrays = {"params", "arrays.json", "sizes.json", "checksums.json", "unused.safetensors", "source.json"}
    assert found == {*names, "preprocessor_config.json", "config.json", *arrays}
    assert summary.config.image_aspect == "pad"


def test_the_tokenizer_may_come_from_another_folder(hf, tmp_path):
    (hf / "tokenizer.model").write_text("other")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    convert(hf, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert [path.name for path in (tmp_path / "out").glob("tokenizer*")] == ["tokenizer.json"]


def test_an_original_checkpoint_takes_the_image_processor_of_its_tower(original, tmp_path):
    summary = convert(original, tmp_path / "out")
    assert not summary.has_tokenizer
    expected = (tmp_path / "clip_tower" / "preprocessor_config.json").read_text()
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == expected


def test_the_processor_of_transformers_5_says_whether_pictures_are_padded(hf, tmp_path):
    (hf / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR}))
    assert convert(hf, tmp_path / "out").config.image_aspect == "pad"
