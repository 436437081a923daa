"""Conversion of Qwen-VL checkpoints in both directions, and what is refused."""

import dataclasses
import json
import shutil
import subprocess

import numpy as np
import pytest
import tiny_qwen
import torch
import transformers
from command import PDROP
from safetensors.numpy import load_file, save_file
from tiny_qwen import KINDS

from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.check import compare
from pdrop_jax.convert.exporter import export
from pdrop_jax.convert.hf_config import hf_config, llava_from_hf, namings_for
from pdrop_jax.convert.importer import read, write
from pdrop_jax.convert.names import torch_arrays
from pdrop_jax.convert.sources import open_source
from pdrop_jax.errors import UserError
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.model.params import count, init_params

# config.json of the hub, where the language model's keys stand beside the model's own.
HUB_2_5 = {
    "model_type": "qwen2_5_vl",
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vocab_size": 152064,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}


def test_the_hubs_config():
    config = llava_from_hf(HUB_2_5)
    assert config.vision == QwenVisionConfig(tokens_per_second=2)
    text = config.text
    assert (text.mrope_sections, text.rope_theta, text.head_dim, text.qkv_bias) == ((16, 24, 24), 1e6, 128, True)
    assert (text.num_layers, text.num_kv_heads, text.sliding_window, text.family) == (28, 4, None, "qwen2_5_vl")
    assert (config.schedule.layers, config.schedule.positions) == ((7, 14, 21), "original")
    assert (config.image_token_id, config.eos_token_ids, config.template) == (151655, (151645,), "own")


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_survives_hugging_face_and_json(kind, folders):
    config = LlavaConfig.load(folders[kind][1])
    assert llava_from_hf(hf_config(config, "float32"), schedule=config.schedule) == config
    assert LlavaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    theirs = transformers.AutoConfig.for_model(**hf_config(config, "float32"))
    expected = tiny_qwen.torch_model(kind).config
    for part in ("text_config", "vision_config"):
        found = getattr(theirs, part).to_dict()
        for key, value in getattr(expected, part).to_dict().items():
            if key not in ("dtype", "transformers_version", "_name_or_path", "max_window_layers", "rope_parameters"):
                assert found[key] == value, key
    ours, wanted = (x.text_config.rope_parameters for x in (theirs, expected))
    assert {key: ours[key] for key in wanted} == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_the_source_bit_for_bit(kind, folders, tmp_path):
    theirs, ours = folders[kind]
    export(ours, tmp_path / "back", "hf")
    expected, found = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "back"))
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == x.tobytes() for name, x in expected.items())
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert type(model) is type(tiny_qwen.torch_model(kind))
    wanted = tiny_qwen.torch_model(kind).state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in model.state_dict().items())
    files = {path.name for path in (tmp_path / "back").iterdir()}
    assert {"tokenizer.json", "preprocessor_config.json", "generation_config.json"} <= files


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_the_modules_are_read_too(kind, folders, tmp_path):
    theirs, _ = folders[kind]
    shutil.copytree(theirs, tmp_path / "modules")
    state = {name: x.numpy() for name, x in tiny_qwen.torch_model(kind).state_dict().items()}
    save_file(state, tmp_path / "modules" / "model.safetensors")
    config, params = read(tmp_path / "modules")
    again = torch_arrays(config, params, list(namings_for(config).values())[-1])
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[name], x) for name, x in state.items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_array_has_a_name(kind, folders):
    config = LlavaConfig.load(folders[kind][1])
    named = torch_arrays(config, init_params(config), namings_for(config)["hf"])
    assert sum(x.size for x in named.values()) == count(init_params(config))


def test_the_command_line_converts_and_answers_without_torch(folders, tmp_path):
    def pdrop(*arguments):
        done = subprocess.run([*PDROP, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tiny_qwen.photo(60, 200).save(tmp_path / "photo.png")
    pdrop("convert", folders["qwen2_5_vl"][0], tmp_path / "ours", "--layers", 1, "--ratios", 0.5)
    arguments = ["--model", tmp_path / "ours", "--image", tmp_path / "photo.png", "--prompt", "Hm?", "--json"]
    answer = json.loads(pdrop("generate", *arguments, "--max-new-tokens", 4))
    assert answer["schedule"]["positions"] == "original"
    assert [len(image) for image in answer["kept"][0]] == [7]  # of 2 x 7 tokens
    assert len(answer["token_ids"]) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_vl_moe"}, "'qwen3_vl_moe' is not supported.* nearest supported family is qwen3_vl$"),
        ({"model_type": "qwen2_5_omni"}, "'qwen2_5_omni' is not supported.* nearest supported family is qwen2_5_vl"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 16]}}, "add up to half of head_dim 128"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, "'yarn' is not supported"),
        ({"vision_config": HUB_2_5["vision_config"] | {"out_hidden_size": 2048}}, "out_hidden_size is 2048 but the"),
        ({"vision_config": HUB_2_5["vision_config"] | {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported"),
        ({"vision_config": HUB_2_5["vision_config"] | {"window_size": 20}}, "windows of 20 pixels are smaller"),
        ({"vision_config": HUB_2_5["vision_config"] | {"num_heads": 7}}, "not a multiple of 4 for each of its 7"),
        ({"vision_config": HUB_2_5["vision_config"] | {"depth": "x"}}, "vision_config.depth is 'x'"),
        ({"vocab_size": 100}, "token id 151643 is outside the vocabulary of 100"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    with pytest.raises(UserError, match=message) as error:
        llava_from_hf(HUB_2_5 | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_check_of_a_conversion(kind, dtype, folders, tmp_path):
    source = open_source(folders[kind][0])
    write(source, tmp_path / "ours", dtype=dtype)
    difference, largest = compare(source, tmp_path / "ours")
    assert difference < (1e-4 if dtype == "float32" else 0.05 * largest)
    assert largest > 0.5


@pytest.mark.parametrize("section", ["vision", "text"])
def test_a_damaged_config_names_the_key(section, folders, tmp_path):
    data = LlavaConfig.load(folders["qwen2_5_vl"][1]).to_json()
    with pytest.raises(UserError, match=f"{section}.hidden_size is 'x', it must be a valid integer"):
        LlavaConfig.from_json(data | {section: data[section] | {"hidden_size": "x"}})
    with pytest.raises(UserError, match=f"did you mean {section}.num_layers"):
        LlavaConfig.from_json(data | {section: data[section] | {"num_layer": 3}})


def test_the_original_format_and_crops_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="qwen2_vl model can be exported in Hugging Face's format only"):
        export(folders["qwen2_vl"][1], tmp_path / "back", "original")
    config = dataclasses.replace(LlavaConfig.load(folders["qwen2_vl"][1]))
    with pytest.raises(UserError, match="CLIP or SigLIP tower only, but this model's is qwen2_vl"):
        _ = config.crop_tower
