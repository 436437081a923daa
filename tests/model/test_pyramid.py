"""The whole model with its drops: what changes, and above all what must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TWO_DROPS, assert_close, forward, llava_config, make_batch, make_buffer, params_of, row_of

from pdrop_jax.batch import Bucket
from pdrop_jax.model.decoder import run_stages
from pdrop_jax.model.stacking import restage
from pdrop_jax.schedule import DropSchedule

BUCKET = Bucket(6, (8, 5))
ROWS = [[1, -8, 4, -5, 6, 7], [1, 9, -3, 5], [1, 2, 3, 4, 5]]  # two images, one, none
DENSE = llava_config(schedule=DropSchedule.none())
DROPPED = llava_config()


def params_for(config):
    """The same weights for every schedule."""
    dense = dataclasses.replace(config, schedule=DropSchedule.none())
    return restage(params_of(dense), dense, config.schedule)


def run(config, batch):
    return forward(config, params_for(config), batch)


def assert_same_logits(ours, theirs, rows, atol=1e-5):
    for b in rows:
        n = int(ours.buffer.length[b])
        assert n == theirs.buffer.length[b]
        assert_close(ours.logits[b, :n], theirs.logits[b, :n], atol)


def test_lengths_of_the_stages():
    out = run(DROPPED, make_batch(ROWS, BUCKET))
    # int(8 * .6) + int(5 * .6) = 4 + 3; int(8 * .3) + int(5 * .3) = 2 + 1; int(3 * .6) = 1, int(3 * .3) = 0
    assert np.stack(out.lengths, 1).tolist() == [[17, 11, 7], [6, 4, 3], [5, 5, 5]]


def test_what_a_later_stage_sees_an_earlier_one_saw():
    out = run(DROPPED, make_batch(ROWS, BUCKET))
    first, second = ([set(d.index[b][d.keep[b]].tolist()) for b in range(3)] for d in out.drops)
    assert all(later <= earlier for earlier, later in zip(first, second, strict=True))


def test_each_boundary_keeps_the_best_scores():
    for d in run(DROPPED, make_batch(ROWS, BUCKET)).drops:
        for b, image in ((0, 1), (0, 2), (1, 1)):
            of_image, keep = np.asarray(d.image_id[b]) == image, np.asarray(d.keep[b])
            kept, gone = d.scores[b][of_image & keep], d.scores[b][of_image & ~keep]
            assert min(kept, default=np.inf) >= max(gone, default=-np.inf)


def test_keeping_everything_is_dense():
    batch = make_batch(ROWS, BUCKET)
    everything = llava_config(schedule=DropSchedule((1, 2), (1.0, 1.0)))
    assert_same_logits(run(everything, batch), run(DENSE, batch), rows=range(3))


def test_a_text_only_row_is_dense():
    batch = make_batch(ROWS, BUCKET)
    assert_same_logits(run(DROPPED, batch), run(DENSE, batch), rows=[2])


def test_a_batch_without_images_drops_nothing():
    batch = make_batch([[1, 2, 3], [1, 4]], Bucket(4))
    assert run(DROPPED, batch).drops == ()
    assert_same_logits(run(DROPPED, batch), run(DENSE, batch), rows=range(2))


def test_a_ratio_of_0_leaves_the_text():
    out = run(llava_config(schedule=DropSchedule((1,), (0.0,))), make_batch(ROWS, BUCKET))
    assert out.logits.shape[1] == BUCKET.text
    assert [out.buffer.index[b, :n].tolist() for b, n in enumerate(out.buffer.length)] == [
        [0, 9, 15, 16],
        [0, 1, 5],
        [0, 1, 2, 3, 4],
    ]


@st.composite
def three_rows(draw):
    text = st.lists(st.integers(1, 60), min_size=1, max_size=5)
    images = st.tuples(st.integers(1, 8), st.integers(1, 5))
    return [[1, *(-n for n in draw(images)[: draw(st.integers(0, 2))]), *draw(text)] for _ in range(3)]


@settings(max_examples=10)
@given(three_rows())
def test_a_row_of_a_batch_is_the_row_alone(rows):
    batch = make_batch(rows, BUCKET)
    together, alone = run(DROPPED, batch), run(DROPPED, row_of(batch, 1))
    n = int(alone.buffer.length[0])
    assert together.buffer.index[1, :n].tolist() == alone.buffer.index[0, :n].tolist()
    assert_close(together.logits[1, :n], alone.logits[0, :n], atol=1e-5)


def test_a_row_does_not_depend_on_its_bucket():
    small, large = make_batch([ROWS[1]], Bucket(3, (3,))), make_batch([ROWS[1]], BUCKET)
    large.crops[:, :1] = small.crops
    assert_same_logits(run(DROPPED, small), run(DROPPED, large), rows=[0])


def test_a_drop_before_the_first_layer_is_dense_llava_on_the_kept_tokens():
    batch = make_batch([ROWS[0]], BUCKET)
    dropped = run(llava_config(schedule=DropSchedule((0,), (0.6,))), batch)
    kept = np.asarray(dropped.buffer.index[0, : int(dropped.buffer.length[0])])

    short = make_batch([[1, -4, 4, -3, 6, 7]], Bucket(6, (8, 5)))  # the same layout, then the features that stayed
    short.feature_index[0, : len(kept)] = batch.feature_index[0, kept]
    short.token_ids[0, : len(kept)] = batch.token_ids[0, kept]
    assert_same_logits(dropped, run(DENSE, short), rows=[0])


def test_original_positions_change_the_answer():
    batch = make_batch(ROWS, BUCKET)
    original = llava_config(schedule=dataclasses.replace(TWO_DROPS, positions="original"))
    difference = np.abs(run(original, batch).logits - run(DROPPED, batch).logits)
    assert difference[0].max() > 1e-2


def gradient_of_hidden(schedule):
    """Size of the gradient that each slot of the first buffer receives, and the slots that reach the last stage."""
    config = llava_config(schedule=schedule)
    params, plan = params_for(config), schedule.plan(config.text.num_layers, BUCKET)
    buffer = make_buffer(make_batch([ROWS[0]], BUCKET), D=config.text.hidden_size)

    def loss(hidden):
        first = dataclasses.replace(buffer, hidden=hidden)
        last = run_stages(config, params["stages"], plan, first, BUCKET.images).buffer
        valid = np.arange(last.slots) < last.length[:, None]
        return (last.hidden[..., 0] * valid).sum(), (last.index[0], valid[0])

    gradient, (index, valid) = jax.jit(jax.grad(loss, has_aux=True))(buffer.hidden)
    return np.abs(gradient[0]).max(-1), np.asarray(index)[valid]


def test_a_dropped_token_receives_gradient_through_the_earlier_layers():
    gradient, kept = gradient_of_hidden(DropSchedule((1,), (0.5,)))
    dropped = np.setdiff1d(np.arange(17), kept)
    assert len(dropped) == (8 - 4) + (5 - 2)
    assert (gradient[dropped] > 0).all()


def test_a_token_dropped_before_the_first_layer_receives_no_gradient():
    gradient, kept = gradient_of_hidden(DropSchedule((0,), (0.5,)))
    dropped = np.setdiff1d(np.arange(17), kept)
    assert (gradient[dropped] == 0).all()
    assert (gradient[kept] > 0).all()


def test_a_bfloat16_model_gives_float32_logits_near_its_float32_twin():
    batch = make_batch(ROWS, BUCKET)
    half, full = forward(DENSE, params_of(DENSE, jnp.bfloat16), batch), run(DENSE, batch)
    assert (half.logits.dtype, half.buffer.hidden.dtype) == (jnp.float32, jnp.bfloat16)
    error = np.abs(half.logits - full.logits)[0, :17]
    assert error.max() < 0.05 * np.abs(full.logits[0, :17]).max()
