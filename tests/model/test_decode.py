"""Prefill and decode steps beside the full forward pass over prompt and answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GQA, MHA, TWO_DROPS, assert_close, decode_step, forward, llava_config, make_batch, params_of, prefill

from pdrop_jax.batch import Bucket
from pdrop_jax.model.params import abstract_params
from pdrop_jax.model.stacking import unstack
from pdrop_jax.schedule import DropSchedule

PROMPTS = [[1, -8, 4, -5, 6, 7], [1, 9, -3, 5], [1, 2, 3, 4, 5]]  # rows of 17, 6 and 5 slots; the last without image
ANSWERS = np.array([[11, 12, 13], [21, 22, 23], [31, 32, 33]], np.int32)
BUCKET = Bucket(6, (8, 5))

CONFIGS = {
    "mha": llava_config(MHA),
    "gqa_original_positions": llava_config(GQA, dataclasses.replace(TWO_DROPS, positions="original")),
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


def test_unstacked_parameters_give_the_same():
    config = CONFIGS["mha"]
    flat = unstack(params_of.__wrapped__(config))
    assert_close(step_logits(config, flat), step_logits(config, params_of(config)), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_stage_has_a_cache_of_its_own_length_in_the_dtype_of_the_model(dtype):
    config = llava_config(GQA)
    logits, state, _ = jax.eval_shape(
        lambda params, batch: prefill(config, params, batch, new_slots=4),
        abstract_params(config, dtype),
        make_batch(PROMPTS, BUCKET),
    )
    slots = [19, 6 + 4 + 3, 6 + 2 + 1]
    sizes = [1 * 3 * (n + 4) * GQA.num_kv_heads * GQA.head_dim for n in slots]
    assert [(cache.k.size, cache.v.size) for cache in state.caches] == [(size, size) for size in sizes]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.caches)} == {jnp.dtype(dtype)}
    assert logits.dtype == jnp.float32
