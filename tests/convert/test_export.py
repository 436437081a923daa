"""Export: back to the same names and bits, and to what transformers loads without a word."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tiny_torch import GOLDEN, VARIANTS, as_version_4, assert_same, edit_json, rewrite, weights

from pdrop_jax import checkpoint
from pdrop_jax.convert import exporter
from pdrop_jax.convert.exporter import export
from pdrop_jax.convert.hf_config import llava_from_hf
from pdrop_jax.convert.importer import convert
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

EXAMPLES = GOLDEN.parent.parent / "examples"


def load_in_torch(folder):
    """The model; transformers must find every tensor it wants and want every tensor it finds."""
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_to_hugging_face(variant, hf_folder, tmp_path):
    source = shutil.copytree(hf_folder[variant], tmp_path / "hf")
    rewrite(source, as_version_4)
    convert(source, tmp_path / "ours", schedule=DropSchedule((0, 1), (0.5, 0.25)))
    summary = export(tmp_path / "ours", tmp_path / "back", "hf")
    assert_same(weights(tmp_path / "back"), weights(source))
    assert (summary.tensors, summary.dtype) == (len(weights(source)), "float32")


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_the_export_as_the_same_model(variant, torch_model, hf_folder, tmp_path):
    convert(hf_folder[variant], tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "hf")
    model = load_in_torch(tmp_path / "back")
    theirs, ours = (llava_from_hf(m.config.to_dict()) for m in (torch_model[variant], model))
    assert ours == theirs
    expected, loaded = torch_model[variant].state_dict(), model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], x) for name, x in expected.items())


def test_there_and_back_by_way_of_a_single_file(hf, tmp_path):
    convert(hf, tmp_path / "ours", schedule=DropSchedule((0, 1), (0.5, 0.25)))
    config, params = checkpoint.load(tmp_path / "ours")
    checkpoint.save(tmp_path / "single", config, params, companions=tmp_path / "ours", single_file=True)
    export(tmp_path / "single", tmp_path / "back", "hf")
    assert_same(weights(tmp_path / "back"), as_version_4(weights(hf)))


@pytest.mark.parametrize("name", ["model_mha", "model_gqa"])
def test_there_and_back_to_the_original(name, tmp_path):
    convert(GOLDEN / name, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "original")
    assert_same(weights(tmp_path / "back"), weights(GOLDEN / name))
    assert_same(weights(tmp_path / "back" / "clip_tower"), weights(GOLDEN / "clip_tower"))
    source, back = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN / name, tmp_path / "back"))
    ours_alone = {"head_dim", "unfreeze_mm_vision_tower"}
    same = back.keys() - ours_alone - {"architectures"}
    assert {key: back[key] for key in same} == {key: source[key] for key in same}
    convert(tmp_path / "back", tmp_path / "again")
    assert checkpoint.load(tmp_path / "again")[0] == checkpoint.load(tmp_path / "ours")[0]


def test_tiles_there_and_back(tmp_path):
    """LLaVA-NeXT's original to itself, and to what transformers loads as its LLaVA-NeXT."""
    convert(GOLDEN / "model_anyres", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "original")
    assert_same(weights(tmp_path / "back"), weights(GOLDEN / "model_anyres"))
    source, back = (json.loads((x / "config.json").read_text()) for x in (GOLDEN / "model_anyres", tmp_path / "back"))
    for key in ("image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type"):
        assert back[key] == source[key]
    export(tmp_path / "ours", tmp_path / "hf", "hf")
    model = load_in_torch(tmp_path / "hf")
    assert type(model) is transformers.LlavaNextForConditionalGeneration
    newline = weights(GOLDEN / "model_anyres")["model.image_newline"]
    np.testing.assert_array_equal(model.model.image_newline.detach().numpy(), newline)
    ours = checkpoint.load(tmp_path / "ours")[0].tiling
    assert convert(tmp_path / "hf", tmp_path / "again").config.tiling == dataclasses.replace(ours, rounded=True)


@pytest.mark.parametrize(
    ("variant", "kind"), [("llama_3", "llama"), ("mistral", "mistral"), ("qwen2_siglip_head", "qwen")]
)
def test_the_other_families_there_and_back_by_way_of_the_original_format(variant, kind, hf_folder, tmp_path):
    convert(hf_folder[variant], tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "original", "original")
    data = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (data["model_type"], data["architectures"]) == (f"llava_{kind}", [f"Llava{kind.title()}ForCausalLM"])
    convert(tmp_path / "original", tmp_path / "again")
    config, again = (checkpoint.load(tmp_path / name)[0] for name in ("ours", "again"))
    assert again == dataclasses.replace(config, image_token_id=None)
    export(tmp_path / "again", tmp_path / "original again", "original")
    assert_same(weights(tmp_path / "original again"), weights(tmp_path / "original"))


def test_a_qwen3_has_no_original_format(hf_folder, tmp_path):
    convert(hf_folder["qwen3"], tmp_path / "ours")
    with pytest.raises(UserError, match=r"the original code has no Qwen3: .* --format hf"):
        export(tmp_path / "ours", tmp_path / "original", "original")
    assert not (tmp_path / "original").exists()


def test_the_siglip_tower_beside_an_original_export_loads_in_transformers(torch_model, hf_folder, tmp_path):
    convert(hf_folder["qwen2_siglip_head"], tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "original")
    tower = transformers.AutoModel.from_pretrained(tmp_path / "back" / "siglip_tower")
    expected = torch_model["qwen2_siglip_head"].model.vision_tower.state_dict()
    assert tower.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in tower.state_dict().items())


def test_the_tower_beside_an_original_export_loads_in_transformers(tmp_path):
    convert(GOLDEN / "model_mha", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "original")
    _, info = transformers.CLIPVisionModel.from_pretrained(tmp_path / "back" / "clip_tower", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (tmp_path / "back" / "clip_tower" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_there_and_back(dtype, hf, tmp_path):
    rewrite(hf, lambda tensors: as_version_4({name: x.astype(dtype) for name, x in tensors.items()}))
    # float16 has no place in the model: stored as float32 every bit survives.
    convert(hf, tmp_path / "ours", dtype="float32" if dtype is np.float16 else None)
    export(tmp_path / "ours", tmp_path / "back", "hf", dtype=np.dtype(dtype).name)
    assert_same(weights(tmp_path / "back"), weights(hf))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == np.dtype(dtype).name


def test_a_large_model_is_split(hf, tmp_path, monkeypatch):
    convert(hf, tmp_path / "ours")
    monkeypatch.setattr(exporter, "SHARD_BYTES", 30_000)
    summary = export(tmp_path / "ours", tmp_path / "back", "hf")
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == summary.bytes == sum(x.nbytes for x in weights(hf).values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "back" / file)
    assert_same(weights(tmp_path / "back"), as_version_4(weights(hf)))
    load_in_torch(tmp_path / "back")


def test_an_original_model_gets_an_image_token_for_hugging_face(tmp_path):
    convert(GOLDEN / "model_gqa", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "hf")
    model = load_in_torch(tmp_path / "back")
    source = weights(GOLDEN / "model_gqa")
    for ours, theirs in (("lm_head", "lm_head"), ("model.language_model.embed_tokens", "model.embed_tokens")):
        found, expected = model.state_dict()[f"{ours}.weight"].numpy(), source[f"{theirs}.weight"]
        assert found.shape == (384, 64)
        np.testing.assert_array_equal(found[:320], expected)
        np.testing.assert_array_equal(found[320:], np.tile(expected[:1], (64, 1)))
    assert model.config.image_token_id == 320


def test_the_processor_of_transformers_works_on_an_exported_original_model(tmp_path):
    convert(GOLDEN / "model_mha", tmp_path / "ours", tokenizer=EXAMPLES / "tiny_tokenizer")
    export(tmp_path / "ours", tmp_path / "back", "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back", use_fast=False)
    assert processor.image_processor.do_pad
    tokenizer = processor.tokenizer
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(tmp_path / "ours"))
    if vocabulary == 320:
        assert tokenizer.convert_tokens_to_ids("<image>") == 320
    assert convert(tmp_path / "back", tmp_path / "again").config.image_aspect == "pad"


def test_a_linear_projector_goes_to_the_original_format_only(original, tmp_path):
    edit_json(original / "config.json", mm_projector_type="linear")
    projector = {"weight": np.ones((64, 32), np.float32), "bias": np.zeros(64, np.float32)}
    renamed = {f"model.mm_projector.{kind}": x for kind, x in projector.items()}
    rewrite(original, lambda old: {n: x for n, x in old.items() if "mm_projector" not in n} | renamed)
    convert(original, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "original")
    assert_same(weights(tmp_path / "back"), weights(original))
    with pytest.raises(UserError, match="projector of 2 layers, but this model's has 1: use --format original"):
        export(tmp_path / "ours", tmp_path / "hf", "hf")


def test_the_tokenizer_travels_on(hf, tmp_path):
    (hf / "tokenizer.model").write_text("words")
    convert(hf, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "hf")
    assert (tmp_path / "back" / "tokenizer.model").read_text() == "words"
    assert not (tmp_path / "back" / "unused.safetensors").exists()
