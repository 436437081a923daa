"""The loss in chunks against the plain one over all logits."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, assert_close, llava_config, params_of, training_batch

from pdrop_jax.batch import IGNORE
from pdrop_jax.config import Remat
from pdrop_jax.model import vlm
from pdrop_jax.model.loss import compute_loss, count_targets, cross_entropy

CONFIG = llava_config()


def plain_loss(params, batch):
    output = vlm.forward(CONFIG, params, batch)
    logits, targets = output.logits[:, :-1], output.buffer.labels[:, 1:]
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(targets == IGNORE, 0.0, own).sum()


@pytest.mark.parametrize("chunk", [1, 6, 15, 1024])
def test_chunks_change_nothing(chunk):
    params, batch = params_of(CONFIG), training_batch()

    def chunked(params):
        buffer = vlm.forward_hidden(CONFIG, params, batch).buffer
        return cross_entropy(CONFIG, params, buffer, most=batch.bucket.text, chunk=chunk)

    loss, gradient = jax.jit(jax.value_and_grad(chunked))(params)
    expected, like = jax.jit(jax.value_and_grad(plain_loss))(params, batch)
    assert_close(loss, expected)
    jax.tree.map(lambda x, y: assert_close(x, y, atol=1e-4 * np.abs(y).max() + 1e-6), gradient, like)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(remat: Remat):
    params, batch = params_of(CONFIG), training_batch()

    def loss(params, remat):
        return compute_loss(CONFIG, params, batch, remat=remat)[0]

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    jax.tree.map(
        lambda x, y: assert_close(x, y, atol=1e-4 * np.abs(y).max() + 1e-6),
        gradient(params, remat),
        gradient(params, "none"),
    )


def test_the_logits_of_all_positions_never_exist():
    params, batch = params_of(CONFIG), training_batch()

    def chunked(params):
        buffer = vlm.forward_hidden(CONFIG, params, batch).buffer
        return cross_entropy(CONFIG, params, buffer, most=batch.bucket.text, chunk=6)

    shapes = {tuple(v.aval.shape) for v in _variables(jax.make_jaxpr(jax.grad(chunked))(params).jaxpr)}
    assert (3, 2, VOCAB) in shapes
    assert not any(len(s) == 3 and s[-1] == VOCAB and s[0] == 3 and s[1] > 2 for s in shapes)


def _variables(jaxpr):
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _variables(inner)


def test_targets_are_counted_without_slot_0():
    assert int(count_targets(jnp.array([[5, IGNORE, 7], [IGNORE, 6, 6]]))) == 3


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    """A sum of ones in bfloat16 would stop at 256."""
    ids = np.array([[3] * 1023, [3] * 1022 + [5]], np.int32)

    def total(table):
        return vlm.embed_tokens(CONFIG, {"embed": {"embedding": table}}, ids).astype(jnp.float32).sum()

    gradient = jax.grad(total)(jnp.zeros((VOCAB, CONFIG.text.hidden_size), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    assert set(np.asarray(gradient[3], np.float32)) == {2048.0}  # 2,045 in bfloat16
    assert set(np.asarray(gradient[5], np.float32)) == {1.0}
    assert not gradient[:3].any()
