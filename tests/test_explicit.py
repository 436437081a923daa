"""The model traced on a mesh whose axes are of type Explicit: there a sharding is part of an array's type.

Such a trace needs no devices, compiles nothing, and fails where two arrays are cut so that they do not fit. Two things
are out of its reach: fsdp cuts the rows alone here, since the compiler brings a layer's parameters together, not the
model; and the loss has the vocabulary whole, since ``jnp.take_along_axis`` cannot be told how to cut its result.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from tiny import GQA, MHA, llava_config, make_batch

from pdrop_jax import sharding
from pdrop_jax.batch import Bucket
from pdrop_jax.model import vlm
from pdrop_jax.model.lora import add_lora
from pdrop_jax.model.params import abstract_params
from pdrop_jax.train.optimizer import make_optimizer
from pdrop_jax.train.recipe import OptimizerRecipe
from pdrop_jax.train.step import init_state, train_step

MESH = AbstractMesh((2, 2, 2), sharding.AXES, axis_types=(AxisType.Explicit,) * 3)
CONFIG = llava_config()


@pytest.fixture(autouse=True)
def layers_are_whole_along_fsdp(monkeypatch):
    monkeypatch.setattr(sharding, "RULES", {**sharding.RULES, "model": ()})


def batch_of(labels=False):
    batch = make_batch([[1, -16, *range(2, 12)]] * 8, Bucket(112, (16,)))
    batch.labels = batch.token_ids if labels else None
    where = sharding.batch_sharding(MESH)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch)


def traced(function, *arguments):
    with jax.sharding.use_abstract_mesh(MESH):
        return jax.eval_shape(function, *arguments)


def cut_as(x, *axes):
    return x.sharding.is_equivalent_to(NamedSharding(MESH, sharding.partition(axes, x.shape, MESH)), x.ndim)


@pytest.mark.parametrize("implementation", ["xla", "blocked", "splash"])
@pytest.mark.parametrize("text", [MHA, GQA], ids=["mha", "gqa"])
def test_inference(text, implementation):
    config = llava_config(text)
    params, batch = sharding.abstract(abstract_params(config), MESH), batch_of()

    def answer(params, batch):
        logits, state, _ = vlm.prefill(config, params, batch, 8, implementation=implementation)
        return logits, vlm.decode_step(config, params, jnp.zeros(8, int), state, jnp.int32(0))

    output = traced(functools.partial(vlm.forward, config, implementation=implementation), params, batch)
    assert cut_as(output.logits, "batch", None, "vocab")
    assert cut_as(output.buffer.hidden, "batch", None, None)
    logits, (next_logits, state) = traced(answer, params, batch)
    assert cut_as(logits, "batch", "vocab")
    assert cut_as(next_logits, "batch", "vocab")
    for cache in state.caches:
        assert cut_as(cache.k, None, "batch", "heads", None, None)
        assert cut_as(cache.v, None, "batch", "heads", None, None)


@pytest.mark.parametrize("groups", [("vision", "projector", "llm"), ("lora",)], ids=["full", "lora"])
def test_a_training_step(monkeypatch, groups):
    """In parts, optimizer included: what comes out is cut as what went in."""
    monkeypatch.setattr(sharding, "RULES", {**sharding.RULES, "vocab": ()})
    optimizer = make_optimizer(OptimizerRecipe(), 10)

    def init(params):
        params = add_lora(params, CONFIG, 2, 4.0) if "lora" in groups else params
        return init_state(params, groups, optimizer, jnp.bfloat16)

    before = sharding.abstract(jax.eval_shape(init, abstract_params(CONFIG)), MESH)
    step = functools.partial(train_step, CONFIG, optimizer, grad_accum_steps=2)
    after, metrics = traced(step, before, batch_of(labels=True))
    jax.tree.map(
        lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or pytest.fail(f"{x}, {y}"), before, after
    )
    assert metrics.loss.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("wrong", "axes"),
    [
        ("stages.0.mlp.down.kernel", (None, None, "mlp")),  # its outputs, not its inputs
        ("stages.1.attention.k.kernel", (None, None, None, "heads")),  # within a head
        ("stages.2.attention.v.kernel", (None, None, None, "heads")),
        ("projector.linear_1.bias", ("mlp",)),
    ],
)
def test_a_mistake_in_the_table_is_a_type_error(monkeypatch, wrong, axes):
    right = sharding.logical_axes
    monkeypatch.setattr(sharding, "logical_axes", lambda name: axes if name == wrong else right(name))
    params = sharding.abstract(abstract_params(CONFIG), MESH)
    with pytest.raises(Exception, match=r"(?i)shard|cut as"):  # jax keeps the type of its own private
        traced(functools.partial(vlm.prefill, CONFIG, new_slots=8), params, batch_of())
