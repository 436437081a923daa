"""int8 weights: which they are and how close, and a model with them against one with their plain values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GQA, MHA, assert_close, decode_step, forward, llava_config, make_batch, params_of, prefill

from pdrop_jax.batch import Bucket
from pdrop_jax.generation.pretrained import arrange
from pdrop_jax.model.params import path_name
from pdrop_jax.model.quantization import is_quantized, quantize_decoder
from pdrop_jax.model.stacking import unstack
from pdrop_jax.schedule import DropSchedule

CONFIGS = {"mha": llava_config(MHA), "gqa": llava_config(GQA, DropSchedule((0, 2), (0.6, 0.3)))}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
BATCH = make_batch([[1, -8, 4, -5, 6, 7], [1, 9, -3, 5], [1, 2, 3, 4, 5]], Bucket(6, (8, 5)))
INPUTS = {"q": 1, "k": 1, "v": 1, "o": (1, 2), "gate": 1, "up": 1, "down": 1}  # axes of a stack that are summed over


def reference(params):
    """The quantized ``params`` with float32 kernels: the values that their int8 numbers stand for."""

    def plain(x):
        return np.asarray(x.qvalue, np.float32) * np.asarray(x.scale) if is_quantized(x) else x

    return jax.tree.map(plain, params, is_leaf=is_quantized)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_decoders_kernels_are_within_half_a_step_and_the_rest_is_untouched(dtype):
    params = params_of(CONFIGS["mha"], dtype)
    ours = jax.tree.leaves_with_path(quantize_decoder(CONFIGS["mha"], params), is_leaf=is_quantized)
    names = set()
    for (path, x), (_, original) in zip(ours, jax.tree.leaves_with_path(params), strict=True):
        name = path_name(path)
        if not (name.startswith("stages.") and name.endswith(".kernel")):
            assert x is original
            continue
        names.add(name.split(".")[3])
        original = np.asarray(original, np.float32)
        largest = np.abs(original).max(INPUTS[name.split(".")[3]], keepdims=True)
        assert x.qvalue.dtype == jnp.int8
        assert x.scale.dtype == jnp.float32
        np.testing.assert_allclose(x.scale, largest / 127.5, rtol=1e-6)
        error = np.abs(np.asarray(x.qvalue, np.float32) * x.scale - original)
        assert (error <= 0.5001 * np.asarray(x.scale)).all()
        assert error.max() > 0.4 * np.asarray(x.scale).min()
    assert names == set(INPUTS)


@configs
def test_logits_and_kept_tokens_are_those_of_the_plain_values(config):
    params = quantize_decoder(config, params_of(config))
    ours, theirs = forward(config, params, BATCH), forward(config, reference(params), BATCH)
    original = forward(config, params_of(config), BATCH)
    assert_close(ours.logits, theirs.logits, 1e-5)
    assert np.abs(np.asarray(ours.logits) - original.logits).max() > 1e-2
    for a, b in zip(ours.drops, theirs.drops, strict=True):
        assert_close(a.scores, b.scores, 1e-6)
        np.testing.assert_array_equal(a.keep, b.keep)
    # The first scores of "gqa" are of the embeddings: nothing but the q and k of the ranking itself differs.
    assert np.abs(np.asarray(ours.drops[0].scores) - original.drops[0].scores).max() > 1e-4


def test_prefill_and_decoding_are_those_of_the_plain_values():
    config = CONFIGS["gqa"]

    def logits(params):
        first, state, _ = prefill(config, params, BATCH, new_slots=2)
        second, _ = decode_step(config, params, np.array([11, 12, 13], np.int32), state, jnp.int32(0))
        return np.stack([first, second])

    params = quantize_decoder(config, params_of(config))
    assert_close(logits(params), logits(reference(params)), 1e-5)


def test_a_list_of_layers_is_quantized_as_a_stack_is():
    config = CONFIGS["gqa"]
    stacked = quantize_decoder(config, params_of(config))
    layers = quantize_decoder(config, unstack(jax.tree.map(lambda x: x, params_of(config))))
    for stage, stack in stacked["stages"].items():
        for n, layer in enumerate(layers["stages"][stage]):
            jax.tree.map(np.testing.assert_array_equal, layer, jax.tree.map(lambda x: x[n], stack))  # noqa: B023


def test_a_gpu_is_given_the_same_model_as_a_list_of_layers(monkeypatch):
    config = CONFIGS["gqa"]
    stacked = quantize_decoder(config, params_of(config))
    expected = forward(config, stacked, BATCH).buffer.hidden
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    listed = arrange(config, jax.tree.map(lambda x: x, stacked))
    monkeypatch.undo()
    assert all(isinstance(stage, list) for stage in listed["stages"].values())
    assert is_quantized(listed["stages"]["1"][0]["mlp"]["up"]["kernel"])
    assert_close(forward(config, listed, BATCH).buffer.hidden, expected, 1e-5)


def test_quantizing_twice_is_quantizing_once():
    once = quantize_decoder(CONFIGS["mha"], params_of(CONFIGS["mha"]))
    twice = quantize_decoder(CONFIGS["mha"], once)
    assert jax.tree.structure(once) == jax.tree.structure(twice)
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_activations_keep_their_dtype():
    config = CONFIGS["gqa"]
    params = quantize_decoder(config, params_of(config, jnp.bfloat16))
    out = jax.eval_shape(lambda p: forward(config, p, BATCH), params)
    assert out.buffer.hidden.dtype == jnp.bfloat16
