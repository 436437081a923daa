"""One optimizer step: what it changes, what it must not change, and how it is cut."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import llava_config, make_batch, params_of, training_batch

from pdrop_jax.batch import IGNORE, Bucket
from pdrop_jax.model.lora import add_lora
from pdrop_jax.model.params import path_name, spec_of
from pdrop_jax.train.optimizer import learning_rate, make_optimizer
from pdrop_jax.train.recipe import OptimizerRecipe
from pdrop_jax.train.step import (
    compiler_options,
    init_state,
    join,
    split,
    train_step,
    train_step_with,
    unknown_options,
)

CONFIG = llava_config()
ADAMW = make_optimizer(
    CONFIG, OptimizerRecipe(learning_rate=1e-2, vision_learning_rate=1e-3, warmup=0.0, weight_decay=0.1), 20
)


def batch_of(rows):
    batch = training_batch()
    return jax.tree.map(lambda x: np.concatenate([x] * rows)[:rows], batch)


def fresh(groups=("projector", "llm"), params=None):
    params = jax.tree.map(jnp.array, params_of(CONFIG)) if params is None else params
    return init_state(CONFIG, params, groups, ADAMW, jnp.float32)


def step(state, batch, **settings):
    return train_step(CONFIG, ADAMW, state, batch, dtype=jnp.float32, **settings)


def test_the_loss_falls():
    state, losses = fresh(), []
    for _ in range(10):
        state, metrics = step(state, batch_of(3))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 10
    assert int(metrics.skipped) == 0


def test_four_parts_of_two_rows_are_one_of_eight():
    whole, one = step(fresh(), batch_of(8))
    cut, four = step(fresh(), batch_of(8), grad_accum_steps=4)
    assert float(one.loss) == pytest.approx(float(four.loss), rel=1e-6)
    assert float(one.grad_norm) == pytest.approx(float(four.grad_norm), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), whole.optimizer, cut.optimizer)


def test_two_parts_of_rows_without_pictures_are_the_whole():
    batch = make_batch([[1, 5, 6, 7], [1, 9, 4], [1, 8], [1, 3, 3, 3]], Bucket(6))
    batch.labels = np.where(np.arange(6) < batch.length[:, None], batch.token_ids, IGNORE).astype(np.int32)
    whole, one = step(fresh(), batch)
    cut, two = step(fresh(), batch, grad_accum_steps=2)
    assert float(one.loss) == pytest.approx(float(two.loss), rel=1e-6)
    assert float(one.grad_norm) == pytest.approx(float(two.grad_norm), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), whole.optimizer, cut.optimizer)


@pytest.mark.parametrize("groups", [("projector",), ("projector", "llm"), ("vision",), ("lora",)])
def test_a_frozen_group_does_not_change_by_one_bit(groups):
    params = add_lora(params_of(CONFIG), CONFIG, rank=2, alpha=4.0)
    before = jax.tree.map(np.array, params)
    state = fresh(groups, jax.tree.map(jnp.array, params))
    for _ in range(3):
        state, _ = step(state, batch_of(3))
    after = join(state.trained, state.frozen)
    changed = set()

    def compare(path, old, new):
        if not np.array_equal(old, np.asarray(new)):
            changed.add(spec_of(CONFIG, path_name(path)).group)

    jax.tree.map_with_path(compare, before, after)
    assert changed == set(groups)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    batch = batch_of(3)
    state, _ = step(fresh(), batch)
    before = jax.tree.map(np.array, state.trained)
    spoiled = jax.tree.map(lambda x: x, batch)
    spoiled.crops = np.full_like(batch.crops, np.nan)
    state, metrics = step(state, spoiled)
    assert int(metrics.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state.trained))
    state, metrics = step(state, batch)
    assert int(metrics.skipped) == 1
    assert np.isfinite(float(metrics.loss))


def test_no_step_compiles_twice():
    state = fresh()
    state, _ = step(state, batch_of(3))
    compiled = train_step._cache_size()
    for _ in range(3):
        state, _ = step(state, batch_of(3))
    assert train_step._cache_size() == compiled


def test_norms_and_biases_do_not_decay():
    params = params_of(CONFIG)
    optimizer = make_optimizer(CONFIG, OptimizerRecipe(learning_rate=1.0, warmup=0.0, weight_decay=0.5), 10)
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)

    def check(path, update, value):
        rate = 0.0 if path_name(path).endswith((".scale", ".bias")) else -0.5
        np.testing.assert_allclose(update, rate * value, atol=1e-6)

    jax.tree.map_with_path(check, updates, params)


def test_groups_have_rates_of_their_own():
    params = jax.tree.map(jnp.ones_like, params_of(CONFIG))
    optimizer = make_optimizer(CONFIG, OptimizerRecipe(learning_rate=1e-2, vision_learning_rate=1e-3, warmup=0.0), 10)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert float(updates["vision"]["embed"]["class_token"][0]) == pytest.approx(-1e-3, rel=1e-3)
    assert float(updates["projector"]["linear_0"]["bias"][0]) == pytest.approx(-1e-2, rel=1e-3)


MATRICES = {"q": (1, 2), "o": (2, 1), "down": (1, 1), "patch": (3, 1), "linear_0": (1, 1)}  # dims in, dims out


def matrices_of(path, x):
    """``x`` as matrices (n, in, out), None for what is none."""
    *_, module, kind = path_name(path).split(".")
    if kind != "kernel" or module not in MATRICES:
        return None
    dims_in, dims_out = MATRICES[module]
    shape = x.shape[-dims_in - dims_out :]
    return x.reshape(-1, math.prod(shape[:dims_in]), math.prod(shape[dims_in:]))


@pytest.mark.parametrize("groups", [("vision", "projector", "llm"), ("projector",)])
def test_muon_moves_all_directions_of_a_matrix_alike(groups):
    """Directions in which the gradient differs ten times over."""

    def gradient_of(path, x):
        matrices = matrices_of(path, x)
        if matrices is None:
            return jnp.sign(x) + x
        u, s, v = jnp.linalg.svd(matrices, full_matrices=False)
        return (u * jnp.linspace(1.0, 0.1, s.shape[-1]) @ v).reshape(x.shape)

    trained, _ = split(CONFIG, jax.tree.map(jnp.asarray, params_of(CONFIG)), groups)
    gradient = jax.tree.map_with_path(gradient_of, trained)
    optimizer = make_optimizer(CONFIG, OptimizerRecipe("muon", learning_rate=1e-2, warmup=0.0), 10)
    updates, _ = optimizer.update(gradient, optimizer.init(trained), trained)
    seen = set()
    for path, update in jax.tree.leaves_with_path(updates):
        *_, module, kind = path_name(path).split(".")
        matrices = matrices_of(path, update)
        if matrices is not None:
            seen.add(module)
            spread = jnp.linalg.svd(matrices, compute_uv=False)
            assert (spread[:, 0] < 2 * spread[:, -1]).all()
            rms = jnp.sqrt((matrices**2).mean(axis=(1, 2)))
            np.testing.assert_allclose(rms, 0.2e-2, rtol=0.25)
        elif kind in ("embedding", "bias", "scale") or module == "head":
            np.testing.assert_allclose(jnp.abs(update), abs(update.ravel()[0]), rtol=1e-3)  # Adam's first step
    assert seen == (set(MATRICES) if len(groups) > 1 else {"linear_0"})


def test_the_learning_rate_rises_and_falls():
    rate = learning_rate(2.0, 0.03, 100)
    assert [float(rate(n)) for n in (0, 3, 100)] == pytest.approx([0.0, 2.0, 0.0], abs=1e-6)
    assert float(rate(51)) == pytest.approx(1.0 + np.cos(np.pi * 48 / 97), rel=1e-5)


def test_what_is_split_is_joined():
    params = params_of(CONFIG)
    trained, frozen = split(CONFIG, params, ("projector",))
    assert {spec_of(CONFIG, path_name(path)).group for path, _ in jax.tree.leaves_with_path(trained)} == {"projector"}
    assert not jax.tree.leaves(frozen["projector"])
    assert jax.tree.structure(join(trained, frozen)) == jax.tree.structure(params)
    assert isinstance(ADAMW, optax.GradientTransformation)


def test_options_that_a_compiler_does_not_know_are_left_out():
    known = {"xla_cpu_enable_fast_math": "False"}
    assert unknown_options(known | {"xla_no_such_option": "true"}) == ["xla_no_such_option"]
    assert unknown_options(known) == unknown_options({}) == []
    assert train_step_with(compiler_options("cpu", 1)) is train_step
    few = train_step_with(compiler_options("tpu", 1))
    assert few is train_step_with(compiler_options("tpu", 1))  # or it would be compiled again
    assert few is not train_step_with(compiler_options("tpu", 2)) is not train_step
