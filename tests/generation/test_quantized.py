"""A quantized model with a quantized cache: conversations and running batches answer as ``generate`` does."""

import dataclasses

import jax
import numpy as np
from test_chat import NEW, TURNS, converse
from test_chat import model as plain

from pdrop_jax.batch import Bucket
from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.slots import slot_bytes, slot_shape
from pdrop_jax.model.quantization import quantize_decoder


def test_sessions_and_engines_answer_as_generate():
    model = plain()
    config = model.config.with_cache_dtype("int8")
    params = quantize_decoder(config, model.params, "w8a8")
    processor = dataclasses.replace(model.processor, config=config)
    model = dataclasses.replace(model, config=config, params=params, processor=processor)

    session = Session(model)
    answers = converse(session, TURNS[:2])
    turns = [*session.turns[:1], (session.turns[1][0], None)]
    whole = generate(model, [turns], [TURNS[0][1]], Sampling(NEW))
    assert (answers[1].token_ids, answers[1].kept) == (whole.token_ids[0], whole.kept[0])

    buckets = [Bucket(64, (16,))]
    one = generate(model, [TURNS[0][0]], [TURNS[0][1]], Sampling(NEW))
    assert answers[0].token_ids == one.token_ids[0]
    with Engine(model, 2, max_new_tokens=NEW, buckets=buckets) as engine:
        handles = [engine.submit(*TURNS[0], Sampling(NEW)) for _ in range(2)]
        assert [handle.result().token_ids for handle in handles] == [one.token_ids[0]] * 2
        state = engine._batch._state
        assert engine.memory == sum(
            np.asarray(jax.random.key_data(x) if x.dtype == state.key.dtype else x).nbytes
            for x in jax.tree.leaves(state)
        )
    shape = slot_shape(config, buckets, NEW)
    by_token = 2 * 2 * (8 + 4)  # keys and values, heads, int8 values and a scale
    others = slot_bytes(config, shape, model.dtype) - by_token * sum(shape.sizes)
    assert 0 < others < 64
