"""KV caches in int8 and int4: what they hold, and that prefill, decoding and later turns see the same values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode import BUCKET, PROMPTS, full_logits, step_logits
from test_multi_turn import WHOLE, chunk_at, keep, nothing, rerank_turns, whole_at
from tiny import GQA, MHA, TWO_DROPS, assert_close, forward, llava_config, make_batch, params_of, prefill

from pdrop_jax.analysis.cost import cost_of
from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.model import cache
from pdrop_jax.model.quantization import stored_bytes
from pdrop_jax.schedule import DropSchedule

BY_SLOTS = dataclasses.replace(MHA, sliding_window=6, full_layers=(1,))


GROUPED = llava_config(GQA, dataclasses.replace(TWO_DROPS, positions="original"))


@pytest.mark.parametrize(
    "config",
    [GROUPED.with_cache_dtype("int8"), llava_config(BY_SLOTS).with_cache_dtype("int4")],
    ids=["int8, grouped", "int4, windows by slots"],
)
def test_prefill_and_decode_are_the_full_forward(config):
    """A forward pass without a cache sees keys and values as a cache would hold them."""
    assert_close(step_logits(config, params_of(config)), full_logits(config, params_of(config)), atol=1e-5)


def test_turns_of_a_conversation_are_the_prefill_of_the_whole():
    config = llava_config(MHA).with_cache_dtype("int4")
    params = params_of(config)
    for turn, (logits, _, drops) in enumerate(rerank_turns(config, params)):
        expected, _, chosen = prefill(config, params, whole_at(turn), new_slots=4)
        assert_close(logits, expected, atol=1e-5)
        for ours, theirs in zip(drops, chosen, strict=True):
            np.testing.assert_array_equal(ours.keep, theirs.keep)
    logits, *_ = keep(config, params, chunk_at(0), nothing(config), WHOLE.slots)
    assert_close(logits, prefill(config, params, chunk_at(0), new_slots=4)[0], atol=1e-5)


@pytest.mark.parametrize(("dtype", "steps"), [("int8", 127), ("int4", 7)])
def test_a_vector_is_within_half_a_step_of_its_own_scale(dtype, steps):
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32)
    stored = cache.as_cached(jnp.asarray(x), dtype)
    assert stored.qvalue.dtype == dtype
    np.testing.assert_allclose(stored.scale, np.abs(x).max(-1) / steps, rtol=1e-6)
    error = np.abs(np.asarray(cache.restored(stored, jnp.float32)) - x)
    assert (error <= 0.5001 * np.asarray(stored.scale)[..., None]).all()


def test_the_cache_is_where_and_what_it_says():
    config = llava_config(GQA).with_cache_dtype("int8")
    _, state, _ = prefill(config, params_of(config), make_batch(PROMPTS, BUCKET), new_slots=4)
    plan = config.schedule.plan(3, BUCKET)
    for stage, found in zip(plan, state.caches, strict=True):
        assert found.slots == stage.slots + 4
        assert found.k.qvalue.shape == (1, 3, 2, stage.slots + 4, 16)
        assert found.v.scale.shape == (1, 3, 2, stage.slots + 4)
    slots = sum(stage.slots + 4 for stage in plan)
    assert cache.cache_bytes(state.caches) == 3 * 2 * 2 * slots * (16 + 4)  # rows, k and v, heads, values and a scale


def test_an_int4_takes_half_a_byte_but_on_a_cpu(monkeypatch):
    x = jax.ShapeDtypeStruct((6, 8), jnp.int4)
    assert stored_bytes(x) == jnp.zeros((6, 8), jnp.int4).on_device_size_in_bytes() == 48
    monkeypatch.setattr("pdrop_jax.model.quantization.platform", lambda: "tpu")
    assert stored_bytes((x, jax.ShapeDtypeStruct((3,), jnp.int8))) == 24 + 3


def test_costs_count_the_values_and_a_scale_for_each_head():
    dense, bucket = dataclasses.replace(LlavaConfig.llava_1_5_7b(), schedule=DropSchedule.none()), Bucket(64, (576,))
    plain = cost_of(dense, bucket).cache_bytes
    assert plain == 640 * 32 * 2 * 32 * 128 * 2
    assert cost_of(dense.with_cache_dtype("int8"), bucket).cache_bytes == plain * (128 + 4) / 256
    assert cost_of(dense.with_cache_dtype("int4"), bucket).cache_bytes == plain * (64 + 4) / 256


def test_scores_are_of_the_quantized_keys():
    """The first drop ranks embeddings: nothing but the keys of the ranking differs, by less with more bits."""
    config = llava_config(MHA, DropSchedule((0,), (0.5,)))
    batch = make_batch(PROMPTS, BUCKET)
    of = {dtype: forward(config.with_cache_dtype(dtype), params_of(config), batch) for dtype in (None, "int8", "int4")}
    exact, *others = (np.asarray(out.drops[0].scores) for out in of.values())
    eight, four = (np.abs(found - exact).max() for found in others)
    assert 0 < eight < 0.2 * four
