"""Shapes of the real models without their memory, and lowering for accelerators that are not there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from tiny import MHA, forward, llava_config, make_batch, prefill

from pdrop_jax.batch import Batch, Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.model import vlm
from pdrop_jax.model.params import abstract_params

REAL = {"7b": LlavaConfig.llava_1_5_7b(), "13b": LlavaConfig.llava_1_5_13b()}
real_sizes = pytest.mark.parametrize("config", REAL.values(), ids=REAL)


def abstract_batch(B=2, text=64, images=1):
    """One or more pictures of 576 tokens in each row."""
    bucket = Bucket(text, (576,) * images)

    def slots(*shape):
        return jax.ShapeDtypeStruct((B, *shape), jnp.int32)

    S = bucket.slots
    crops = jax.ShapeDtypeStruct((B, images, 336, 336, 3), jnp.float32)
    return Batch(slots(S), slots(S, 1), slots(S), slots(), crops, slots(1), bucket=bucket)


@real_sizes
def test_forward_of_the_real_sizes(config):
    out = jax.eval_shape(functools.partial(vlm.forward, config), abstract_params(config), abstract_batch())
    assert out.logits.shape == (2, 64 + 72, 32000)
    assert [drop.keep.shape for drop in out.drops] == [(2, 64 + n) for n in (576, 288, 144)]


@real_sizes
def test_prefill_and_decode_step_of_the_real_sizes(config):
    params = abstract_params(config, jnp.bfloat16)
    logits, state, _ = jax.eval_shape(functools.partial(vlm.prefill, config, new_slots=32), params, abstract_batch())
    layers = [8, 8, 8, config.text.num_layers - 24]
    slots = [64 + n + 32 for n in (576, 288, 144, 72)]
    expected = [L * 2 * C * config.text.num_kv_heads * 128 for L, C in zip(layers, slots, strict=True)]
    assert [cache.k.size for cache in state.caches] == expected

    token = jax.ShapeDtypeStruct((2,), jnp.int32)
    step = functools.partial(vlm.decode_step, config)
    again, after = jax.eval_shape(step, params, token, state, jax.ShapeDtypeStruct((), jnp.int32))
    assert again.shape == logits.shape == (2, 32000)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_several_pictures_of_the_real_size():
    config = REAL["7b"]
    batch = abstract_batch(B=1, images=4)
    out = jax.eval_shape(functools.partial(vlm.forward, config), abstract_params(config), batch)
    assert out.logits.shape == (1, 64 + 4 * 72, 32000)


SMALL = llava_config(dataclasses.replace(MHA, head_dim=128))
SMALL_BATCH = make_batch([[1, -16, 4]], Bucket(112, (16,)))


def lowered(function, platform, **options):
    params = abstract_params(SMALL, jnp.bfloat16)
    return function.trace(SMALL, params, SMALL_BATCH, **options).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_forward_lowers_for_accelerators(platform):
    assert "stablehlo.dot_general" in lowered(forward, platform)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_prefill_lowers_for_accelerators(platform):
    assert "stablehlo.dot_general" in lowered(prefill, platform, new_slots=4)


def test_forward_lowers_to_the_tpu_kernel():
    assert "tpu_custom_call" in lowered(forward, "tpu", implementation="splash")


def test_the_buffers_of_the_tpu_kernel_are_aligned():
    aligned = functools.partial(vlm.forward, SMALL, implementation="splash")
    out = jax.eval_shape(aligned, abstract_params(SMALL, jnp.bfloat16), SMALL_BATCH)
    # 112 + 16, 112 + int(16 * .6) and 112 + int(16 * .3) tokens
    assert [drop.keep.shape[1] for drop in out.drops] + [out.logits.shape[1]] == [128, 128, 128]
