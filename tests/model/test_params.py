"""The parameter tree: values, stage boundaries, and the number of parameters of the published models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import GQA, MHA, TWO_DROPS, llava_config, params_of
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration
from transformers import LlavaConfig as HFLlavaConfig

from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.convert.hf_parts import text_to_hf, vision_to_hf
from pdrop_jax.model.params import abstract_params, count, init_params, path_name
from pdrop_jax.model.stacking import restage, unstack
from pdrop_jax.schedule import DropSchedule

SCHEDULES = [DropSchedule.none(), TWO_DROPS, DropSchedule((0,), (0.5,)), DropSchedule((0, 2), (0.5, 0.5))]


def assert_equal_trees(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("new", SCHEDULES, ids=str)
@pytest.mark.parametrize("old", SCHEDULES, ids=str)
def test_restage_there_and_back_changes_nothing(old, new):
    before, between = llava_config(GQA, old), llava_config(GQA, new)
    moved = restage(params_of(before), before, new)
    assert jax.tree.map(np.shape, moved) == jax.tree.map(lambda x: x.shape, abstract_params(between))
    assert_equal_trees(restage(moved, between, old), params_of(before))


def test_restage_keeps_the_order_of_the_layers():
    dense = llava_config(schedule=DropSchedule.none())
    params = params_of(dense)
    stages = restage(params, dense, TWO_DROPS)["stages"]
    joined = jax.tree.map(lambda *xs: np.concatenate(xs), *(stages[str(s)] for s in range(3)))
    assert_equal_trees(joined, params["stages"]["0"])


def test_restage_serves_jax_arrays():
    dense = llava_config(schedule=DropSchedule.none())
    params = jax.tree.map(jnp.asarray, params_of(dense))
    moved = restage(params, dense, TWO_DROPS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(moved))
    assert_equal_trees(moved, restage(params_of(dense), dense, TWO_DROPS))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_unstack_gives_each_layer_its_own_arrays(schedule):
    config = llava_config(schedule=schedule)
    flat = unstack(params_of.__wrapped__(config))
    for s, (start, stop) in enumerate(schedule.layer_ranges(config.text.num_layers)):
        layers = flat["stages"][str(s)]
        assert len(layers) == stop - start
        for n, layer in enumerate(layers):
            assert_equal_trees(layer, jax.tree.map(lambda x: x[n], params_of(config)["stages"][str(s)]))  # noqa: B023


EVEN = LlavaConfig(  # equal sizes throughout: each shape of random numbers is compiled anew
    VisionConfig(16, 4, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=4),
    TextConfig(16, 16, 16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4),
    DropSchedule.none(),
)


@functools.cache
def initial(seed):
    return init_params(EVEN, seed)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_init_has_the_declared_shapes_and_dtype(dtype):
    config = llava_config(GQA)
    params = jax.eval_shape(lambda: init_params(config, dtype=dtype))
    declared = abstract_params(config, dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), declared)


def test_init_gives_every_layer_its_own_values():
    kernel = initial(0)["stages"]["0"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
    assert np.std(kernel) == pytest.approx(16**-0.5, rel=0.1)  # 1 / sqrt(fan-in)


def test_init_repeats_itself_and_follows_the_seed():
    again = init_params(EVEN, 0)
    assert_equal_trees(initial(0), again)
    assert not np.array_equal(initial(0)["head"]["kernel"], initial(1)["head"]["kernel"])


def test_a_tied_model_has_no_head():
    tied = llava_config(dataclasses.replace(MHA, tie_embeddings=True))
    assert "head" not in abstract_params(tied)


def test_path_names_are_dotted():
    names = {path_name(path) for path, _ in jax.tree.leaves_with_path(abstract_params(llava_config()))}
    assert {"embed.embedding", "stages.0.mlp.up.kernel", "vision.layers.attention.q.bias"} <= names


# A CLIP layer: q, k, v, o, up and down with biases, two norms. LLaVA-1.5 projects the last hidden state but one.
UNUSED_CLIP_LAYER = 4 * (1024 * 1024 + 1024) + (1024 * 4096 + 4096) + (4096 * 1024 + 1024) + 2 * 2 * 1024
UNUSED_POST_NORM = 2 * 1024


def test_llava_1_5_7b_has_the_published_number_of_parameters():
    padding = 64 * 4096 * 2  # the Hugging Face checkpoint pads the vocabulary to 32064, in embedding and head
    published = 7_063_427_072
    ours = count(abstract_params(LlavaConfig.llava_1_5_7b()))
    assert ours == published - padding - UNUSED_CLIP_LAYER - UNUSED_POST_NORM


@pytest.mark.parametrize("config", [LlavaConfig.llava_1_5_7b(), LlavaConfig.llava_1_5_13b()], ids=["7b", "13b"])
def test_the_real_sizes_have_as_many_parameters_as_torch(config):
    text = LlamaConfig(**text_to_hf(config.text))
    vision = CLIPVisionConfig(**vision_to_hf(config.vision))
    with torch.device("meta"):
        theirs = LlavaForConditionalGeneration(HFLlavaConfig(vision_config=vision, text_config=text))
    total = sum(parameter.numel() for parameter in theirs.parameters())
    assert count(abstract_params(config)) == total - UNUSED_CLIP_LAYER - UNUSED_POST_NORM
