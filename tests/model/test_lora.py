"""Adapters: none at first, the same merged as applied, wherever a layer is used and however it is stored."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GQA, MHA, TWO_DROPS, assert_close, decode_step, forward, llava_config, make_batch, params_of, prefill

from pdrop_jax.batch import Bucket
from pdrop_jax.config import Projection
from pdrop_jax.errors import UserError
from pdrop_jax.model import vlm
from pdrop_jax.model.lora import BLOCKS, add_lora, has_lora, merge_lora
from pdrop_jax.model.params import abstract_params, count, path_name
from pdrop_jax.model.stacking import restage, unstack
from pdrop_jax.schedule import DropSchedule

CONFIGS = {
    "mha": llava_config(MHA),
    "gqa": llava_config(GQA),
    "layer_0": llava_config(GQA, DropSchedule((0, 2), (0.6, 0.3))),
}
BATCH = make_batch([[1, -8, 4, -5, 6, 7], [1, 9, -3, 5], [1, 2, 3, 4, 5]], Bucket(6, (8, 5)))
R = 4


def trained(params, config, targets=tuple(BLOCKS), **kwargs):
    """``params`` with adapters whose b is random, as after some steps."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        is_b = is_adapter(path) and path[-1].key == "b"
        return jnp.asarray(rng.standard_normal(x.shape, np.float32)) / 4 if is_b else x

    return jax.tree.map_with_path(leaf, add_lora(params, config, R, 2 * R, targets, **kwargs))


def is_adapter(path):
    return ".lora." in path_name(path)


def adapters_of(params):
    """``params`` with None in place of all that is no adapter."""
    return jax.tree.map_with_path(lambda path, x: x if is_adapter(path) else None, params)


def with_adapters(params, adapters):
    return jax.tree.map(lambda x, y: x if y is None else y, params, adapters, is_leaf=lambda x: x is None)


def assert_equal_trees(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_same_output(ours, theirs, atol):
    assert_close(ours.logits, theirs.logits, atol)
    for a, b in zip(ours.drops, theirs.drops, strict=True):
        assert_close(a.scores, b.scores, atol)
        np.testing.assert_array_equal(a.keep, b.keep)


def test_recipes_may_name_every_projection_of_a_layer():
    assert get_args(Projection) == tuple(BLOCKS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_fresh_adapters_change_nothing(config):
    params = params_of(config)
    fresh = add_lora(params, config, R, 2 * R)
    assert_same_output(forward(config, fresh, BATCH), forward(config, params, BATCH), atol=0)


@pytest.mark.parametrize("targets", [("q", "v"), ("o", "down"), tuple(BLOCKS)], ids=" ".join)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_is_applied(config, targets):
    params = trained(params_of(config), config, targets)
    merged = merge_lora(params)
    assert jax.tree.structure(merged) == jax.tree.structure(params_of(config))
    applied = forward(config, params, BATCH)
    assert_same_output(applied, forward(config, merged, BATCH), atol=1e-5)
    assert np.abs(np.asarray(applied.logits) - forward(config, params_of(config), BATCH).logits).max() > 0.1


def test_the_ranking_sees_the_adapters():
    config = CONFIGS["layer_0"]  # whose first scores are of the embeddings: nothing but the ranking's own q differs
    base = params_of(config)
    before, after = (forward(config, params, BATCH).drops[0].scores for params in (base, trained(base, config)))
    assert np.abs(np.asarray(before) - after).max() > 1e-3


@pytest.mark.parametrize("stored", ["stacked", "unstacked"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_is_applied_in_prefill_and_decoding(stored, config):
    params = trained(params_of(config), config)

    def logits(params):
        params = unstack(jax.tree.map(lambda x: x, params)) if stored == "unstacked" else params
        first, state, _ = prefill(config, params, BATCH, new_slots=2)
        second, _ = decode_step(config, params, np.array([11, 12, 13], np.int32), state, jnp.int32(0))
        return np.stack([first, second])

    assert_close(logits(params), logits(merge_lora(params)), atol=1e-5)


def test_a_list_of_layers_is_merged_as_a_stack_is():
    config = CONFIGS["gqa"]
    params = trained(params_of(config), config)
    flat = unstack(jax.tree.map(lambda x: x, params))
    assert has_lora(flat)
    expected = unstack(merge_lora(params))
    ours = merge_lora(flat)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), ours, expected)
    assert not has_lora(ours)


@pytest.mark.parametrize("new", [DropSchedule.none(), TWO_DROPS, DropSchedule((0,), (0.5,))], ids=str)
def test_adapters_belong_to_their_layer_whatever_the_schedule(new):
    config = CONFIGS["layer_0"]
    moved = restage(add_lora(params_of(config), config, R, R, seed=3), config, new)
    other = dataclasses.replace(config, schedule=new)
    assert_equal_trees(moved, add_lora(restage(params_of(config), config, new), other, R, R, seed=3))


@pytest.mark.parametrize("config", [CONFIGS["mha"], CONFIGS["gqa"]], ids=["mha", "gqa"])
def test_gradient_of_the_adapters_alone(config):
    params = trained(params_of(config), config)

    def loss(params):
        logits = vlm.forward(config, params, BATCH).logits
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 7])

    found = jax.jit(jax.grad(lambda adapters: loss(with_adapters(params, adapters))))(adapters_of(params))
    kernels = jax.jit(jax.grad(loss))(merge_lora(params))["stages"]
    for s in params["stages"]:
        for name, block in BLOCKS.items():
            # dL/da = scale * dL/dW b', dL/db = scale * a' dL/dW, by layer
            adapter, grad = (tree["stages"][s][block][name]["lora"] for tree in (params, found))
            L, scale = adapter["scale"].shape[0], 2.0
            a, b = np.reshape(adapter["a"], (L, -1, R)), np.reshape(adapter["b"], (L, R, -1))
            kernel = np.reshape(kernels[s][block][name]["kernel"], (L, a.shape[1], b.shape[2]))
            expected = scale * kernel @ b.swapaxes(1, 2), scale * a.swapaxes(1, 2) @ kernel
            assert_close(np.reshape(grad["a"], a.shape), expected[0], 1e-5)
            assert_close(np.reshape(grad["b"], b.shape), expected[1], 1e-5)
            assert np.abs(grad["a"]).max() > 1e-4
            assert not np.asarray(grad["scale"]).any()


def test_initial_values():
    config = CONFIGS["gqa"]
    stage = add_lora(params_of(config), config, 32, 48)["stages"]["2"]
    o = stage["attention"]["o"]["lora"]
    assert o["a"].shape == (1, 4, 16, 32)
    assert o["b"].shape == (1, 32, 32)
    assert not np.asarray(o["b"]).any()
    assert o["scale"].tolist() == [1.5]
    assert np.abs(o["a"]).max() == pytest.approx(1 / 8, rel=0.02)  # 1 / sqrt(4 * 16)
    assert np.std(o["a"]) == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    again, other = (add_lora(params_of(config), config, 32, 48, seed=seed) for seed in (0, 1))
    assert_equal_trees(again["stages"]["2"], stage)
    assert not np.array_equal(other["stages"]["2"]["mlp"]["up"]["lora"]["a"], stage["mlp"]["up"]["lora"]["a"])


def test_abstract_parameters_and_their_count():
    config = CONFIGS["mha"]
    params = jax.eval_shape(lambda p: add_lora(p, config, R, R, ["q", "down"]), abstract_params(config))
    # of 3 layers: q 32 -> 4 x 8, down 48 -> 32, a scale each
    assert count(params) - count(abstract_params(config)) == 3 * (R * (32 + 32) + 1 + R * (48 + 32) + 1)


def test_bfloat16_parameters_stay_bfloat16():
    config = CONFIGS["gqa"]
    base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params_of(config))
    params = trained(base, config)
    assert {x.dtype for x in jax.tree.leaves(adapters_of(params))} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(merge_lora(params))} == {jnp.dtype("bfloat16")}
    out = jax.eval_shape(lambda p: vlm.forward(config, p, BATCH), params)
    assert out.buffer.hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        (["q", "k_proj"], 4, "unknown LoRA targets k_proj: choose from q, k, v, o, gate, up, down"),
        ([], 4, "LoRA without targets: choose from q"),
        (["q"], 0, "the LoRA rank is 0: it must be at least 1"),
    ],
)
def test_what_makes_no_adapters(targets, rank, message):
    config = CONFIGS["mha"]
    with pytest.raises(UserError, match=message):
        add_lora(params_of(config), config, rank, 8, targets)


def test_adapters_are_not_added_twice():
    config = CONFIGS["mha"]
    params = add_lora(params_of(config), config, R, R, ["q"])
    assert has_lora(params)
    assert not has_lora(params_of(config))
    with pytest.raises(UserError, match="already carry LoRA adapters"):
        add_lora(params, config, R, R, ["k"])
