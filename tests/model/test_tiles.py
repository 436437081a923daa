"""Weights as a TPU reads them: the same numbers, padded with zeros and stored in another order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GQA, MHA, assert_close, decode_step, llava_config, make_batch, params_of, prefill

from pdrop_jax.batch import Bucket
from pdrop_jax.model.quantization import quantize_decoder
from pdrop_jax.model.stacking import restage
from pdrop_jax.model.tiles import HEADS_FIRST, LANES, tile
from pdrop_jax.schedule import DropSchedule

CONFIGS = {
    "mha": llava_config(MHA),
    "gqa": llava_config(GQA, DropSchedule((0, 2), (0.6, 0.3))),
    "qk_norm": llava_config(dataclasses.replace(MHA, qk_norm=True)),
}
BATCH = make_batch([[1, -8, 4, -5, 6, 7], [1, 9, -3, 5], [1, 2, 3, 4, 5]], Bucket(6, (8, 5)))


def fresh(config, quantized=False):
    params = jax.tree.map(jnp.asarray, params_of(config))  # new dicts: ``tile`` replaces their arrays
    return quantize_decoder(config, params) if quantized else params


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_model_computes_the_same(config, quantized):
    def run(params):
        logits, state, _ = prefill(config, params, BATCH, 2)
        return logits, decode_step(config, params, jnp.array([5, 6, 7]), state, jnp.int32(0))[0]

    for ours, expected in zip(run(tile(config, fresh(config, quantized))), run(fresh(config, quantized)), strict=True):
        assert_close(ours, expected, atol=1e-5)


def test_heads_come_first_and_the_mlp_is_whole_tiles():
    config = CONFIGS["mha"]
    plain, tiled = fresh(config)["stages"]["0"], tile(config, fresh(config))["stages"]["0"]
    for name in "qkv":
        kernel = tiled["attention"][name]["kernel"]
        assert kernel.format.layout.major_to_minor == HEADS_FIRST.major_to_minor
        assert np.array_equal(kernel, plain["attention"][name]["kernel"])
    for name, axis in {"gate": 2, "up": 2, "down": 1}.items():
        kernel, old = tiled["mlp"][name]["kernel"], plain["mlp"][name]["kernel"]
        assert kernel.shape[axis] % LANES == 0
        own, padding = np.split(kernel, [old.shape[axis]], axis)
        assert np.array_equal(own, old)
        assert padding.size
        assert not padding.any()


def test_what_is_tiled_is_not_copied_but_another_schedules_stacks_are_tiled_again():
    config = CONFIGS["mha"]
    tiled = tile(config, fresh(config))
    before = jax.tree.leaves(tiled)
    assert all(a is b for a, b in zip(jax.tree.leaves(tile(config, tiled)), before, strict=True))
    dense = tile(config, restage(tiled, config, DropSchedule.none()))
    assert dense["stages"]["0"]["attention"]["q"]["kernel"].format.layout.major_to_minor == HEADS_FIRST.major_to_minor
