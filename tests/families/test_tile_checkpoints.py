"""Conversion of models whose pictures are tiles in both directions, released sizes, and what is refused."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_tiles import KINDS, torch_model

from pdrop_jax.analysis.cost import prefill_macs
from pdrop_jax.config import MODELS, LlavaConfig, config_of
from pdrop_jax.convert.check import compare
from pdrop_jax.convert.exporter import export
from pdrop_jax.convert.hf_config import hf_config, llava_from_hf, namings_for
from pdrop_jax.convert.importer import read, write
from pdrop_jax.convert.names import torch_arrays, torch_shapes
from pdrop_jax.convert.sources import open_source
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import largest_picture
from pdrop_jax.inputs.buckets import bucket_for
from pdrop_jax.model import vlm
from pdrop_jax.model.params import abstract_params, count
from pdrop_jax.planner.programs import abstract_batch
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.sharding import make_mesh

# config.json of the hub, as far as it is read.
INTERNVL3_8B = {
    "model_type": "internvl",
    "downsample_ratio": 0.5,
    "image_seq_length": 256,
    "image_token_id": 151667,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151674,
    },
    "vision_config": {
        "attention_bias": True,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": [448, 448],
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": 0.1,
        "model_type": "internvl_vision",
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": [14, 14],
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_qk_norm": False,
    },
}
SMOLVLM2_2B = {
    "model_type": "smolvlm",
    "image_token_id": 49190,
    "scale_factor": 3,
    "tie_word_embeddings": False,
    "text_config": {
        "bos_token_id": 1,
        "eos_token_id": 49279,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 130000.0,
        "vocab_size": 49280,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "smolvlm_vision",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
HUB = {"internvl3-8b": INTERNVL3_8B, "smolvlm2-2.2b": SMOLVLM2_2B}
RELEASED = [name for name in MODELS if name.startswith(("internvl", "smolvlm"))]
# Millions of parameters as the models are named, and billions as InternVL3.5's table of models lists them.
MILLIONS = {"internvl3-1b": 938, "smolvlm2-256m": 256, "smolvlm2-500m": 507, "smolvlm2-2.2b": 2246}
BILLIONS = {"1b": 1.1, "2b": 2.3, "4b": 4.7, "8b": 8.5, "14b": 15.1, "38b": 38.4}


@pytest.mark.parametrize(("name", "tokens"), [("internvl3-8b", 13 * 256), ("smolvlm2-2.2b", 17 * 81)])
def test_costs_are_those_of_the_largest_picture_of_the_released_processor(name, tokens):
    config = config_of(name)
    assert largest_picture(config) == tokens
    assert bucket_for(64, (tokens,), config).crops == tokens // config.image_tokens


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_config(name):
    assert llava_from_hf(HUB[name]) == config_of(name)
    assert config_of(name).schedule.positions == "dense"


@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_of_the_released_sizes(name):
    """Names and shapes are those of transformers' class, built without memory."""
    config = config_of(name)
    with torch.device("meta"):
        theirs = transformers.AutoModelForImageTextToText.from_config(
            transformers.AutoConfig.for_model(**hf_config(config, "bfloat16"))
        )
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert torch_shapes(config, list(namings_for(config).values())[-1]) == expected
    if name in MILLIONS:
        assert count(abstract_params(config)) // 10**6 == MILLIONS[name]
    if name.startswith("internvl3.5"):
        assert round(count(abstract_params(config)) / 1e9, 1) == BILLIONS[name.rpartition("-")[2]]


@pytest.mark.parametrize("name", ["internvl3-78b", "internvl3.5-8b", "smolvlm2-2.2b"])
def test_forward_and_decode_of_the_released_sizes(name):
    config = config_of(name)
    config = type(config)(**{**vars(config), "schedule": DropSchedule((5, 12), (0.5, 0.25))})
    n = config.image_tokens
    bucket = bucket_for(64, (7 * n, n), config)
    assert bucket.crops == 8
    batch = abstract_batch(config, make_mesh({}), bucket, 2, training=False)
    params = abstract_params(config, jnp.bfloat16)
    _, state, _ = jax.eval_shape(functools.partial(vlm.prefill, config, new_slots=8), params, batch)
    zero = jax.ShapeDtypeStruct((2,), jnp.int32)
    logits, _ = jax.eval_shape(
        functools.partial(vlm.decode_step, config), params, zero, state, jax.ShapeDtypeStruct((), jnp.int32)
    )
    assert logits.shape == (2, config.text.vocab_size)
    assert [x.shape for x in state.lengths] == [(2,)] * 3
    out = jax.eval_shape(functools.partial(vlm.forward, config), params, batch)
    assert out.logits.shape[1] == 64 + int(7 * n * 0.25) + int(n * 0.25)


@pytest.mark.parametrize("name", ["internvl3-1b", "smolvlm2-256m"])
def test_macs_of_the_tower_are_those_that_xla_counts(name):
    """With one layer, because the compiler counts the body of a loop once."""
    config = config_of(name)
    small = {"num_layers": 1, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4}
    small["image_size"] = 16 * config.vision.patch_size
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **small))
    bucket = bucket_for(32, (4 * config.image_tokens,), config)
    batch = abstract_batch(config, make_mesh({}), bucket, 1, training=False)
    program = jax.jit(vlm.tower_features, static_argnums=0).lower(config, abstract_params(config), batch)
    macs = prefill_macs(config, bucket)
    assert program.compile().cost_analysis()["flops"] / 2 == pytest.approx(macs.vision + macs.projector, rel=0.1)


# max_window_layers means nothing without windows, and the whole model's word about tied embeddings goes first.
OTHERS = ("dtype", "transformers_version", "_name_or_path", "eos_token_id", "max_window_layers", "tie_word_embeddings")


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_survives_hugging_face_and_json(kind, tiles):
    config = LlavaConfig.load(tiles[kind][1])
    assert llava_from_hf(hf_config(config, "float32"), schedule=config.schedule) == config
    assert LlavaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    theirs = transformers.AutoConfig.for_model(**hf_config(config, "float32"))
    expected = torch_model(kind).config
    for part in ("text_config", "vision_config"):
        found = getattr(theirs, part).to_dict()
        for key, value in getattr(expected, part).to_dict().items():
            if key not in OTHERS:
                assert found[key] == value, key


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_the_source_bit_for_bit(kind, tiles, tmp_path):
    export(tiles[kind][1], tmp_path / "back", "hf")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert type(model) is type(torch_model(kind))
    wanted, found = torch_model(kind).state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(x, wanted[name]) for name, x in found.items())
    assert {"tokenizer.json", "preprocessor_config.json"} <= {path.name for path in (tmp_path / "back").iterdir()}
    with pytest.raises(UserError, match="model can be exported in Hugging Face's format only"):
        export(tiles[kind][1], tmp_path / "original", "original")


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_name_the_tensors_is_read(kind, tiles, tmp_path):
    theirs = tiles[kind][0]
    config, params = read(theirs)
    for key, naming in namings_for(config).items():
        shutil.copytree(theirs, tmp_path / key)
        state = torch_arrays(config, params, naming)
        save_file({name: np.ascontiguousarray(x) for name, x in state.items()}, tmp_path / key / "model.safetensors")
        _, again = read(tmp_path / key)
        assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    assert load_file(theirs / "model.safetensors").keys() in [
        torch_shapes(config, naming).keys() for naming in namings_for(config).values()
    ]


@pytest.mark.parametrize("kind", ["internvl-6b", "smolvlm"])
def test_the_check_of_a_conversion(kind, tiles, tmp_path):
    source = open_source(tiles[kind][0])
    write(source, tmp_path / "ours", dtype="float32")
    difference, largest = compare(source, tmp_path / "ours")
    assert difference < 1e-4
    assert largest > 0.5


def text(**changes):
    return {"text_config": INTERNVL3_8B["text_config"] | changes}


def vision(**changes):
    return {"vision_config": INTERNVL3_8B["vision_config"] | changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "internvl_chat"}, "'internvl_chat' is not supported.* nearest supported family is internvl"),
        (text(model_type="internlm3"), "language model_type 'internlm3' is not supported"),
        (text(hidden_size="x"), r"text_config.hidden_size is 'x'"),
        (text(vocab_size=100), "token id 151643 is outside the vocabulary of 100"),
        (vision(use_mean_pooling=False), "use_mean_pooling False is not supported"),
        (vision(use_mask_token=True), "use_mask_token True is not supported"),
        (vision(use_absolute_position_embeddings=False), "use_absolute_position_embeddings False is not supported"),
        (vision(norm_type="batch_norm"), "norm_type 'batch_norm' is not supported"),
        (vision(image_size=[448, 224]), "image_size is 448x224, but only squares"),
        (vision(image_size=[462, 462]), "33 patches a side cannot be merged by squares of 2"),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
        ({"image_seq_length": 64}, "image_seq_length is 64, but a tile of this tower has 256 tokens"),
        ({"vision_feature_layer": -2}, "vision_feature_layer -2 is not supported"),
        ({"vision_feature_select_strategy": "full"}, "'full' is not supported"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    with pytest.raises(UserError, match=message) as error:
        llava_from_hf(INTERNVL3_8B | change)
    assert "\n" not in str(error.value)


def smol_vision(**changes):
    return {"vision_config": SMOLVLM2_2B["vision_config"] | changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "idefics2"}, "'idefics2' is not supported.* nearest supported family is idefics3"),
        ({"model_type": "smolvlm_vision"}, "'smolvlm_vision' is not supported.* nearest supported family is smolvlm"),
        ({"text_config": SMOLVLM2_2B["text_config"] | {"model_type": "gemma"}}, "model_type 'gemma' is not supported"),
        ({"scale_factor": 4}, "27 patches a side cannot be merged by squares of 4"),
        (smol_vision(image_size=[384, 392]), "image_size is 384x392, but only squares"),
        (smol_vision(num_channels=1), "num_channels 1 is not supported"),
    ],
)
def test_what_is_not_supported_of_smolvlm_is_refused(change, message):
    with pytest.raises(UserError, match=message) as error:
        llava_from_hf(SMOLVLM2_2B | change)
    assert "\n" not in str(error.value)
