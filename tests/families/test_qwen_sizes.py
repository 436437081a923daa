"""The released sizes without their memory: shapes, costs and shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_qwen
import torch
import transformers
from test_qwen_checkpoints import HUB_2_5

from pdrop_jax.analysis.cost import prefill_macs
from pdrop_jax.config import MODELS, LlavaConfig
from pdrop_jax.convert.hf_config import hf_config, llava_from_hf, namings_for
from pdrop_jax.convert.names import torch_shapes
from pdrop_jax.generation.pretrained import load
from pdrop_jax.inputs.buckets import bucket_for
from pdrop_jax.model import vlm
from pdrop_jax.model.params import abstract_params, count
from pdrop_jax.planner.programs import abstract_batch
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.sharding import make_mesh

SIZES = {  # parameters, as the hub says
    "qwen2.5-vl-3b": 3.754e9,
    "qwen2.5-vl-7b": 8.292e9,
    "qwen2.5-vl-32b": 33.453e9,
    "qwen2.5-vl-72b": 73.41e9,
    "qwen3-vl-2b": 2.127e9,
    "qwen3-vl-4b": 4.438e9,
    "qwen3-vl-8b": 8.767e9,
    "qwen3-vl-32b": 33.36e9,
}


def test_seven_billion_is_the_hubs_config():
    config = llava_from_hf(HUB_2_5, generation={"eos_token_id": [151645, 151643]})
    assert config == LlavaConfig.qwen2_5_vl("7b")


@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_of_the_released_sizes(size):
    """Names and shapes are those of transformers' class, built without memory."""
    config = MODELS[size]()
    with torch.device("meta"):
        theirs = transformers.AutoModelForImageTextToText.from_config(
            transformers.AutoConfig.for_model(**hf_config(config, "bfloat16"))
        )
    tied = {"lm_head.weight"} if config.text.tie_embeddings else set()
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items() if name not in tied}
    assert torch_shapes(config, list(namings_for(config).values())[-1]) == expected
    assert count(abstract_params(config)) == pytest.approx(SIZES[size], rel=2e-3)


@pytest.mark.parametrize("size", SIZES)
def test_forward_and_decode_of_the_released_sizes(size):
    config = MODELS[size]()
    L = config.text.num_layers
    config = type(config)(**{**vars(config), "schedule": DropSchedule((L // 4, L // 2), (0.5, 0.25))})
    bucket = bucket_for(64, (1024, 256), config)
    crops = 1024 + 256 if config.additions else 80 + 25
    assert (bucket.images, bucket.crops) == ((1024, 256), crops)
    batch = abstract_batch(config, make_mesh({}), bucket, 2, training=False)
    params = abstract_params(config, jnp.bfloat16)
    out = jax.eval_shape(functools.partial(vlm.forward, config), params, batch)
    assert out.logits.shape == (2, 64 + 256 + 64, config.text.vocab_size)
    _, state, _ = jax.eval_shape(functools.partial(vlm.prefill, config, new_slots=8), params, batch)
    zero = jax.ShapeDtypeStruct((2,), jnp.int32)
    logits, _ = jax.eval_shape(
        functools.partial(vlm.decode_step, config), params, zero, state, jax.ShapeDtypeStruct((), jnp.int32)
    )
    assert logits.shape == (2, config.text.vocab_size)


@pytest.mark.parametrize("kind", tiny_qwen.KINDS)
def test_macs_of_the_tower_are_those_that_xla_counts(kind, folders):
    model = load(folders[kind][1], schedule=DropSchedule.none())
    bucket = bucket_for(32, (32,), model.config)
    batch = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), abstract_batch(model.config, make_mesh({}), bucket, 1, False)
    )
    program = jax.jit(vlm.tower_features, static_argnums=0).lower(model.config, model.params, batch)
    flops = program.compile().cost_analysis()["flops"]
    macs = prefill_macs(model.config, bucket)
    assert flops / 2 == pytest.approx(macs.vision + macs.projector, rel=0.15)
