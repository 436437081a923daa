"""Quantized weights and activations: which they are, how close, and what a model with them computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GQA, MHA, assert_close, decode_step, forward, llava_config, make_batch, params_of, prefill

from pdrop_jax.batch import Bucket
from pdrop_jax.generation.pretrained import arrange
from pdrop_jax.model.layers import linear
from pdrop_jax.model.params import path_name
from pdrop_jax.model.quantization import BITS, QuantizedKernel, is_quantized, quantize_decoder
from pdrop_jax.model.stacking import restage, unstack
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


@pytest.mark.parametrize(
    ("dtype", "quantization", "steps"),
    [(jnp.float32, "int8", 127.5), (jnp.bfloat16, "int8", 127.5), (jnp.float32, "w4a8", 7.5)],
)
def test_the_decoders_kernels_are_within_half_a_step_and_the_rest_is_untouched(dtype, quantization, steps):
    params = params_of(CONFIGS["mha"], dtype)
    quantized = quantize_decoder(CONFIGS["mha"], params, quantization)
    ours = jax.tree.leaves_with_path(quantized, is_leaf=is_quantized)
    names = set()
    for (path, x), (_, original) in zip(ours, jax.tree.leaves_with_path(params), strict=True):
        name = path_name(path)
        if not (name.startswith("stages.") and name.endswith(".kernel")):
            assert x is original
            continue
        names.add(name.split(".")[3])
        original = np.asarray(original, np.float32)
        largest = np.abs(original).max(INPUTS[name.split(".")[3]], keepdims=True)
        assert x.qvalue.dtype == (jnp.int8 if steps > 8 else jnp.int4)
        assert x.scale.dtype == jnp.float32
        np.testing.assert_allclose(x.scale, largest / steps, rtol=1e-6)
        error = np.abs(np.asarray(x.qvalue, np.float32) * x.scale - original)
        assert (error <= 0.5001 * np.asarray(x.scale)).all()
        assert error.max() > 0.4 * np.asarray(x.scale).min()
    assert names == set(INPUTS)


@pytest.mark.parametrize(("weights", "activations"), [("int8", 8), ("int4", 8), ("int4", 4)])
@pytest.mark.parametrize(("shape", "inputs"), [((8, 3, 5), 1), ((2, 4, 6), 2)])
def test_a_product_of_integers_is_exact(weights, activations, shape, inputs):
    """Each token is rounded with a scale from its largest element; the integers' product and the scales are exact."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, *shape[:inputs])).astype(np.float32)
    qvalue = rng.integers(-7, 8, shape)
    scale = rng.uniform(0.1, 1, [1] * inputs + list(shape[inputs:])).astype(np.float32)
    ours = linear({"kernel": QuantizedKernel(jnp.asarray(qvalue, weights), jnp.asarray(scale), activations)}, x, inputs)

    step = np.abs(x).max(tuple(range(2, x.ndim)), keepdims=True) / (2 ** (activations - 1) - 1)
    rounded = np.round(x / step).astype(int)
    product = np.tensordot(rounded, qvalue, axes=inputs)
    expected = product * step.reshape(2, 3, *[1] * (len(shape) - inputs)) * scale.reshape(shape[inputs:])
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_scores_tend_to_those_in_float_as_bits_grow(monkeypatch):
    """Of weights and activations; the first scores of "gqa" are of the embeddings, the second behind two layers."""
    config, params = CONFIGS["gqa"], params_of(CONFIGS["gqa"])
    exact = forward(config, params, BATCH)
    errors = []
    for bits in (3, 5, 7):
        monkeypatch.setitem(BITS, "some", (bits, bits))
        ours = forward(config, quantize_decoder(config, params, "some"), BATCH)
        assert ours.drops[0].keep.sum() == exact.drops[0].keep.sum()
        errors.append(float(np.abs(ours.drops[0].scores - exact.drops[0].scores).max()))
    three, five, seven = errors
    assert 0 < seven < five / 2 < three / 4


def test_quotas_residual_is_that_of_the_next_layers_inputs():
    """Of the hidden states in front of the drop, which are the embeddings here; without quantization there is none."""
    config = llava_config(MHA, DropSchedule((0,), (0.5,), score="quota", weights=(0, 0, 0, -1)))
    params, image = params_of(config), BATCH.image_id > 0
    assert not forward(config, params, BATCH).drops[0].scores.any()
    scores = forward(config, quantize_decoder(config, params, "w4a4"), BATCH).drops[0].scores
    dense = dataclasses.replace(config, schedule=DropSchedule.none())
    inputs = forward(dense, restage(params, config, dense.schedule), BATCH, keep_hidden=True).layer_inputs[0][0]
    x = np.asarray(inputs)
    step = np.abs(x).max(-1, keepdims=True) / 7
    residual = np.linalg.norm(np.round(x / step) * step - x, axis=-1)
    for b in np.flatnonzero(image.any(1)):
        low, high = np.percentile(residual[b][image[b]], [10, 90])
        expected = -(np.clip(residual[b][image[b]], low, high) - low) / (high - low)
        assert_close(scores[b][image[b]], expected, 1e-5)


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
