"""Prefill and decode steps beside the full forward pass over prompt and answer."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GQA, MHA, TWO_DROPS, assert_close, decode_step, forward, llava_config, make_batch, params_of, prefill

from pdrop_jax.model.cache import cache_bytes
from pdrop_jax.model.params import unstack
from pdrop_jax.schedule import Bucket, DropSchedule

PROMPTS = [[1, -8, 4, -5, 6, 7], [1, 9, -3, 5], [1, 2, 3, 4, 5]]  # rows of 17, 6 and 5 slots; the last without image
ANSWERS = np.array([[11, 12, 13], [21, 22, 23], [31, 32, 33]], np.int32)
BUCKET = Bucket(6, (8, 5))
ORIGINAL = dataclasses.replace(TWO_DROPS, positions="original")

CONFIGS = {
    "mha": llava_config(MHA),
    "gqa": llava_config(GQA),
    "original": llava_config(GQA, ORIGINAL),
    "layer_0": llava_config(MHA, DropSchedule((0,), (0.5,))),
}


def full_logits(config, params):
    """Logits (B, 4, V) from the last prompt token on, ranked by that token as in the prefill."""
    batch = make_batch(PROMPTS, BUCKET)
    rows = [[*prompt, *answer.tolist()] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    longer = make_batch(rows, Bucket(BUCKET.text + 3, BUCKET.images), query_rows=batch.query_rows)
    longer.crops = batch.crops
    out = forward(config, params, longer)
    return np.stack([out.logits[b, n - 4 : n] for b, n in enumerate(out.buffer.length)])


def step_logits(config, params):
    """The same by prefill and decode steps."""
    logits, state, _ = prefill(config, params, make_batch(PROMPTS, BUCKET), new_slots=4)
    found = [logits]
    for step in range(3):
        logits, state = decode_step(config, params, ANSWERS[:, step], state, jnp.int32(step))
        found.append(logits)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_prefill_and_decode_are_the_full_forward(config):
    assert_close(step_logits(config, params_of(config)), full_logits(config, params_of(config)), atol=1e-5)


@pytest.mark.parametrize("config", [CONFIGS["mha"], CONFIGS["layer_0"]], ids=["mha", "layer_0"])
def test_unstacked_parameters_give_the_same(config):
    flat = unstack(params_of.__wrapped__(config))
    assert_close(step_logits(config, flat), step_logits(config, params_of(config)), atol=1e-5)


def test_each_stage_has_a_cache_of_its_own_length():
    config = CONFIGS["gqa"]
    _, state, _ = prefill(config, params_of(config), make_batch(PROMPTS, BUCKET), new_slots=4)
    shapes = [cache.k.shape for cache in state.caches]
    slots = [19, 6 + 4 + 3, 6 + 2 + 1]
    assert shapes == [(1, 3, n + 4, GQA.num_kv_heads, GQA.head_dim) for n in slots]


def test_the_caches_of_a_bfloat16_model_are_bfloat16():
    config = CONFIGS["gqa"]
    logits, state, _ = prefill(config, params_of(config, jnp.bfloat16), make_batch(PROMPTS, BUCKET), new_slots=4)
    assert logits.dtype == jnp.float32
    slots = (19 + 4) + (13 + 4) + (9 + 4)
    assert cache_bytes(state.caches) == 2 * 2 * 3 * slots * GQA.num_kv_heads * GQA.head_dim  # k and v, 2 bytes, 3 rows
