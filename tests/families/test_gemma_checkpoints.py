"""Conversion of Gemma 3 checkpoints in both directions, released sizes, and what is refused."""

import functools
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gemma
import torch
import transformers
from command import PDROP
from safetensors.numpy import load_file, save_file

from pdrop_jax.analysis.cost import prefill_macs
from pdrop_jax.config import LlavaConfig, config_of
from pdrop_jax.convert.check import compare
from pdrop_jax.convert.exporter import export
from pdrop_jax.convert.hf_config import hf_config, llava_from_hf
from pdrop_jax.convert.importer import read, write
from pdrop_jax.convert.names import torch_arrays, torch_shapes
from pdrop_jax.convert.sources import open_source
from pdrop_jax.errors import UserError
from pdrop_jax.families.gemma3.checkpoint import NAMINGS, config_to_hf
from pdrop_jax.generation.pretrained import load
from pdrop_jax.inputs.buckets import bucket_for
from pdrop_jax.model import vlm
from pdrop_jax.model.params import abstract_params, count, init_params
from pdrop_jax.planner.programs import abstract_batch
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.sharding import make_mesh

# config.json of the hub, which leaves out what transformers has as its default.
HUB_4B = {
    "model_type": "gemma3",
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
SIZES = {"4b": 4_300_079_472, "12b": 12_187_325_040, "27b": 27_432_406_640}  # parameters, as the hub says


def test_the_hubs_config():
    config = llava_from_hf(HUB_4B)
    assert config == config_of("gemma-3-4b")
    assert config.text.full_layers == (5, 11, 17, 23, 29)
    assert (config.schedule.layers, config.schedule.positions) == ((11, 17, 23), "dense")


@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_of_the_released_sizes(size):
    """Names and shapes are those of transformers' class, built without memory."""
    config = config_of(f"gemma-3-{size}")
    with torch.device("meta"):
        theirs = transformers.AutoModelForImageTextToText.from_config(
            transformers.AutoConfig.for_model(**config_to_hf(config, {}, "bfloat16"))
        )
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items() if name != "lm_head.weight"}
    assert torch_shapes(config, NAMINGS["hf-5-modules"]) == expected
    assert count(abstract_params(config)) == SIZES[size]


@pytest.mark.parametrize("size", SIZES)
def test_forward_and_decode_of_the_released_sizes(size):
    config = config_of(f"gemma-3-{size}")
    config = type(config)(**{**vars(config), "schedule": DropSchedule((5, 17), (0.5, 0.25))})
    bucket = bucket_for(64, (256, 256), config)
    assert bucket.crops == 2
    batch = abstract_batch(config, make_mesh({}), bucket, 2, training=False)
    params = abstract_params(config, jnp.bfloat16)
    out = jax.eval_shape(functools.partial(vlm.forward, config), params, batch)
    assert out.logits.shape == (2, 64 + 64 + 64, config.text.vocab_size)
    _, state, _ = jax.eval_shape(functools.partial(vlm.prefill, config, new_slots=8), params, batch)
    assert [x.shape for x in state.index] == [(2, 64 + n + 8) for n in (512, 256, 128)]
    zero = jax.ShapeDtypeStruct((2,), jnp.int32)
    logits, _ = jax.eval_shape(
        functools.partial(vlm.decode_step, config), params, zero, state, jax.ShapeDtypeStruct((), jnp.int32)
    )
    assert logits.shape == (2, config.text.vocab_size)


def test_macs_of_the_tower_are_those_that_xla_counts(gemma):
    model = load(gemma[1], schedule=DropSchedule.none())
    bucket = bucket_for(32, (16,), model.config)
    batch = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), abstract_batch(model.config, make_mesh({}), bucket, 1, False)
    )
    program = jax.jit(vlm.tower_features, static_argnums=0).lower(model.config, model.params, batch)
    macs = prefill_macs(model.config, bucket)
    assert program.compile().cost_analysis()["flops"] / 2 == pytest.approx(macs.vision + macs.projector, rel=0.15)


OTHERS = ("dtype", "transformers_version", "_name_or_path", "eos_token_id")


def test_a_config_survives_hugging_face_and_json(gemma):
    config = LlavaConfig.load(gemma[1])
    assert llava_from_hf(hf_config(config, "float32"), schedule=config.schedule) == config
    assert LlavaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    theirs = transformers.AutoConfig.for_model(**hf_config(config, "float32"))
    expected = tiny_gemma.torch_model().config
    for part in ("text_config", "vision_config"):
        found = getattr(theirs, part).to_dict()
        for key, value in getattr(expected, part).to_dict().items():
            # The ends of an answer are those of generation_config.json; the pattern is in layer_types.
            if key not in OTHERS and "sliding_window_pattern" not in key:
                assert found[key] == value, key


def test_an_export_is_the_source_bit_for_bit(gemma, tmp_path):
    export(gemma[1], tmp_path / "back", "hf")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert type(model) is type(tiny_gemma.torch_model())
    wanted = tiny_gemma.torch_model().state_dict()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(x, wanted[name]) for name, x in found.items())
    files = {path.name for path in (tmp_path / "back").iterdir()}
    assert {"tokenizer.json", "preprocessor_config.json", "generation_config.json"} <= files
    with pytest.raises(UserError, match="gemma3 model can be exported in Hugging Face's format only"):
        export(gemma[1], tmp_path / "original", "original")


def test_bfloat16_survives_the_round_trip(gemma, tmp_path):
    """1 + weight is computed, not stored: a sum rounded to bfloat16 would lose the weight's last bits."""
    write(open_source(gemma[0]), tmp_path / "ours", dtype="bfloat16")
    export(tmp_path / "ours", tmp_path / "back", "hf")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    wanted = tiny_gemma.torch_model().state_dict()
    assert all(torch.equal(x, wanted[name].to(torch.bfloat16)) for name, x in model.state_dict().items())


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_way_to_name_the_tensors_is_read(naming, gemma, tmp_path):
    theirs = gemma[0]
    config, params = read(theirs)
    shutil.copytree(theirs, tmp_path / "named")
    state = torch_arrays(config, params, NAMINGS[naming])
    save_file({name: np.ascontiguousarray(x) for name, x in state.items()}, tmp_path / "named" / "model.safetensors")
    _, again = read(tmp_path / "named")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    if naming == "hf-5":
        assert state.keys() == load_file(theirs / "model.safetensors").keys()
    assert sum(x.size for x in state.values()) == count(init_params(config))


def test_the_command_line_converts_and_answers_without_torch(gemma, tmp_path):
    def pdrop(*arguments):
        done = subprocess.run([*PDROP, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tiny_gemma.photo(60, 200).save(tmp_path / "photo.png")
    pdrop("convert", gemma[0], tmp_path / "ours", "--layers", 2, "--ratios", 0.5)
    arguments = ["--model", tmp_path / "ours", "--image", tmp_path / "photo.png", "--prompt", "Hm?", "--json"]
    answer = json.loads(pdrop("generate", *arguments, "--max-new-tokens", 4))
    assert [len(image) for image in answer["kept"][0]] == [8]
    assert "256 -> 128" in pdrop("cost", "--model", "gemma-3-12b", "--layers", 5, "--ratios", 0.5)


def text(**changes):
    return {"text_config": HUB_4B["text_config"] | changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma4"}, "'gemma4' is not supported.* nearest supported family is gemma3"),
        ({"model_type": "gemma3n"}, "'gemma3n' is not supported.* nearest supported family is gemma3"),
        ({"model_type": "gemma3_text"}, "'gemma3_text' is not supported.* nearest supported family is gemma3"),
        (text(final_logit_softcapping=30.0), "final_logit_softcapping 30.0 is not supported"),
        (text(use_bidirectional_attention=True), "use_bidirectional_attention True is not supported"),
        (text(layer_types=["full_attention"]), "layer_types names 1 layers of 34"),
        (text(layer_types=["chunked_attention"] * 34), "layer type 'chunked_attention' is not supported"),
        (text(rope_scaling={"rope_type": "yarn", "factor": 8.0}), "'yarn' is not supported"),
        (text(hidden_activation="silu"), "hidden_activation 'silu' is not supported"),
        (text(hidden_size="x"), r"text_config.hidden_size is 'x'"),
        ({"mm_tokens_per_image": 200}, "mm_tokens_per_image is 200, which is no square"),
        ({"mm_tokens_per_image": 81}, "64 patches a side cannot be averaged to 9 tokens a side"),
        ({"vision_config": HUB_4B["vision_config"] | {"vision_use_head": True}}, "vision_use_head is not supported"),
        ({"vision_config": HUB_4B["vision_config"] | {"model_type": "clip_vision_model"}}, "'clip' is not supported"),
        (text(vocab_size=100), "token id 106 is outside the vocabulary of 100"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    with pytest.raises(UserError, match=message) as error:
        llava_from_hf(HUB_4B | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_of_a_conversion(dtype, gemma, tmp_path):
    source = open_source(gemma[0])
    write(source, tmp_path / "ours", dtype=dtype)
    difference, largest = compare(source, tmp_path / "ours")
    assert difference < (1e-4 if dtype == "float32" else 0.05 * largest)
    assert largest > 0.5
