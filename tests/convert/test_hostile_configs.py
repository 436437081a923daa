"""Every key of a config replaced by what it must not be: a line that names it, or a config that is valid."""

import json
import shutil

import pytest
from mutations import mutations, one_line
from test_source_config import HF_7B, ORIGINAL_7B
from tiny_torch import GOLDEN, edit_json

from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hf_config import llava_from_hf
from pdrop_jax.convert.importer import convert
from pdrop_jax.convert.sources import open_source
from pdrop_jax.errors import UserError

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
HF_ALL = HF_7B | {
    "model_type": "llava_onevision",
    "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[336, 672], [672, 336]],
    "multimodal_projector_bias": True,
    "image_token_index": 32000,
    "video_token_index": 32001,
    "text_config": HF_7B["text_config"]
    | {
        "model_type": "qwen2",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "rope_theta": 1e6,
        "rope_scaling": ROPE,
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * 4,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "max_position_embeddings": 4096,
    },
}
NEXT_VIDEO = HF_7B | {
    "model_type": "llava_next_video",
    "image_grid_pinpoints": [[336, 672]],
    "spatial_pool_mode": "average",
    "spatial_pool_stride": 2,
}
ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "bos_token_id": 1, "eos_token_id": 2}
ORIGINAL_ALL = ORIGINAL_7B | ANYRES | {"image_grid_pinpoints": [[336, 672]], "rope_scaling": ROPE, "rope_theta": 1e4}


@pytest.mark.parametrize("data", [HF_ALL, NEXT_VIDEO, ORIGINAL_ALL], ids=["onevision", "next_video", "original"])
def test_every_key_of_a_foreign_config(data):
    assert isinstance(llava_from_hf(data), LlavaConfig)
    refused = 0
    for path, value, changed in mutations(data):
        with one_line((path, value)) as said:
            config = llava_from_hf(changed)
            # What is accepted has to be within the ranges of our own config.
            assert LlavaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config, (path, value)
        refused += len(said)
    assert refused > 300


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", float("nan"), "text_config.rms_norm_eps is NaN, it must be a finite number"),
        ("hidden_size", 10**9, "text_config.hidden_size is 1000000000, it must be less than or equal to 1048576"),
        ("num_hidden_layers", None, "text_config.num_hidden_layers is null, it must be a valid integer"),
        ("num_attention_heads", "4", "text_config.num_attention_heads is '4', it must be a valid integer"),
        ("vocab_size", 0, "text_config.vocab_size is 0, it must be greater than or equal to 1"),
        ("eos_token_id", 10**9, "text_config.eos_token_id is 1000000000, it must be less than 16777216"),
        ("eos_token_id", 32064, "token id 32064 is outside the vocabulary of 32064 tokens"),
        ("head_dim", 3, "head_dim is 3: rotary embeddings need an even number"),
    ],
)
def test_the_line_names_file_key_value_and_what_is_allowed(key, value, message):
    changed = HF_7B | {"text_config": HF_7B["text_config"] | {key: value}}
    with pytest.raises(UserError) as caught:
        llava_from_hf(changed, where="folder/config.json")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["generation", "preprocessor"])
def test_the_files_beside_a_config(name):
    for path, value, changed in mutations({"eos_token_id": [2], "do_pad": True}):
        with one_line((path, value)):
            llava_from_hf(HF_7B, **{name: changed})


def test_every_key_of_our_own_config():
    data = LlavaConfig.llava_next_7b().to_json()
    data["text"]["rope_scaling"] = {"kind": "llama3", "factor": 8.0}
    assert LlavaConfig.from_json(data).text.rope_scaling
    refused = 0
    for path, value, changed in mutations(data):
        with one_line((path, value)) as said:
            LlavaConfig.from_json(changed)
        refused += len(said)
    assert refused > 400


@pytest.mark.parametrize("key", ["vision", "text", "schedule"])
def test_our_own_config_without_a_section(key):
    data = LlavaConfig().to_json()
    del data[key]
    with pytest.raises(UserError, match=f"it has no {key}"):
        LlavaConfig.from_json(data)


def test_an_unknown_key_of_our_own_config_is_named_with_the_nearest():
    data = LlavaConfig().to_json()
    data["text"]["num_layer"] = 3
    with pytest.raises(UserError, match=r"has an unknown key text.num_layer: did you mean text\.num_layers\?"):
        LlavaConfig.from_json(data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"5",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"a": "\xff"}',
        b'{"hidden_size": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 200_000,
        b'{"model_type": "\\ud800"}',
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "preprocessor_config.json"])
def test_files_that_are_no_json_objects(content, file, hf, tmp_path):
    (hf / file).write_bytes(content)
    with one_line((file, content[:20])) as said:
        convert(hf, tmp_path / "out")
    assert str(hf / file) in said[0] or file == "config.json"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": 5},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 5}},
        {"weight_map": {"a": "../secret.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
    ],
)
def test_an_index_whose_weight_map_is_none(index, hf, tmp_path):
    (hf / "model.safetensors").rename(hf / "model-1.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    with one_line(index) as said:
        convert(hf, tmp_path / "out")
    assert "model.safetensors.index.json" in said[0]


def test_a_sample_of_changed_configs_beside_the_real_files(hf, tmp_path):
    """The whole of opening a checkpoint: its tensors and its tokenizer have to fit what is accepted."""
    data = json.loads((hf / "config.json").read_text())
    refused = 0
    for number, (path, value, changed) in enumerate(mutations(data)):
        if number % 19:
            continue
        (hf / "config.json").write_text(json.dumps(changed))
        with one_line((path, value), listing=True) as said:
            open_source(hf)
        refused += len(said)
    assert refused > 10
    assert not (tmp_path / "out").exists()


def test_a_tower_whose_name_is_no_text(original, tmp_path):
    for value in (5, [], {}, None, "x" * 5000, "\0"):
        edit_json(original / "config.json", mm_vision_tower=value)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with one_line(value) as said:
            convert(original, tmp_path / "out", vision=GOLDEN / "clip_tower" if value is None else None)
        assert bool(said) == (value is not None)
