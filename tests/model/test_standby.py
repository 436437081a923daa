"""Standby tokens: what sees what, what they begin as, how a prompt shows them, and how they are trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CROP, VISION, assert_close, llava_config, params_of, training_batch

from pdrop_jax.batch import IGNORE, Bucket
from pdrop_jax.config import LlavaConfig, StandbyConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.layers import layer_norm, linear, vision_mlp
from pdrop_jax.model.loss import compute_loss
from pdrop_jax.model.params import add_standby
from pdrop_jax.model.standby import seen_crops, standby_layer
from pdrop_jax.model.vision import image_features
from pdrop_jax.model.vlm import embed
from pdrop_jax.train.data.standby import standby_view, views
from pdrop_jax.train.optimizer import make_optimizer
from pdrop_jax.train.recipe import OptimizerRecipe, load_recipe
from pdrop_jax.train.step import init_state, train_step

BASE = dataclasses.replace(llava_config(), select_layer=-1)
CONFIG = dataclasses.replace(BASE, standby=StandbyConfig(8, temporal_layers=1))
CROPS = np.random.default_rng(0).standard_normal((2, 3, CROP, CROP, 3)).astype(np.float32)
APART, TOGETHER = np.tile(np.arange(3, dtype=np.int32), (2, 1)), np.zeros((2, 3), np.int32)
features = jax.jit(
    lambda config, params, crops, clips: (
        image_features(config, params, crops, time=None if clips is None else seen_crops(clips)).tokens
    ),
    static_argnums=0,
)


@functools.cache
def begun():
    return add_standby(CONFIG, params_of(BASE))


def shown(params, crops, clips):
    """The features of patches and of standby tokens, of each crop."""
    both = features(CONFIG, params, crops, clips)
    B, C = crops.shape[:2]
    return both[:, : C * 16].reshape(B, C, 16, -1), both[:, C * 16 :].reshape(B, C, 8, -1)


def test_patches_are_bit_for_bit_those_of_the_model_without():
    plain = features(BASE, params_of(BASE), CROPS, None).reshape(2, 3, 16, -1)
    np.testing.assert_array_equal(shown(begun(), CROPS, TOGETHER)[0], plain)
    other = {**begun(), "standby": params_of(CONFIG)["standby"]}
    np.testing.assert_array_equal(shown(other, CROPS, TOGETHER)[0], plain)


def test_a_standby_token_is_a_token_of_its_crop_that_patches_do_not_see():
    """One layer beside plain attention over patches and standby tokens together, with a mask."""
    params, rng = params_of(CONFIG), np.random.default_rng(1)
    layer = jax.tree.map(lambda x: x[0], params["vision"]["layers"])
    x, s = (jnp.asarray(rng.standard_normal((6, n, 16)), jnp.float32) for n in (17, 8))
    ours, _ = standby_layer(CONFIG, params["standby"], layer, 0, x, s, seen_crops(jnp.asarray(APART)))
    whole = jnp.concatenate([x, s], axis=1)
    h = layer_norm(layer["attention_norm"], whole, VISION.norm_eps)
    q, k, v = (linear(layer["attention"][name], h) for name in "qkv")
    logits = jnp.einsum("PTNH,PSNH->PNTS", q, k) / q.shape[-1] ** 0.5
    mask = np.ones((25, 25), bool)
    mask[:17, 17:] = False
    probs = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    out = whole + linear(layer["attention"]["o"], jnp.einsum("PNTS,PSNH->PTNH", probs, v), inputs=2)
    mlp = jax.tree.map(lambda x: x[0], params["standby"]["mlps"])
    expected = out + vision_mlp(VISION, {**layer, "mlp": mlp}, out)
    assert_close(ours, expected[:, 17:], 1e-5)  # layer 0 of 2 has no attention over time behind it


def test_over_time_a_frame_sees_its_block_up_to_itself():
    """Nothing at first, since the output begins as zero."""
    assert_close(shown(begun(), CROPS, TOGETHER)[1], shown(begun(), CROPS, APART)[1], 1e-6)
    params, other = params_of(CONFIG), CROPS.copy()
    other[:, 1] = 0
    clips = np.array([[0, 0, 0], [0, 0, 1]], np.int32)
    changed = np.abs(shown(params, CROPS, clips)[1] - shown(params, other, clips)[1]).max((2, 3)) > 1e-4
    assert changed.tolist() == [[False, True, True], [False, True, False]]


def test_the_copies_are_the_pretrained_ones():
    standby = begun()["standby"]
    jax.tree.map(np.testing.assert_array_equal, standby["mlps"], params_of(BASE)["vision"]["layers"]["mlp"])
    jax.tree.map(np.testing.assert_array_equal, standby["projector"], params_of(BASE)["projector"])
    assert not np.asarray(standby["temporal"]["attention"]["o"]["kernel"]).any()


def test_a_view_of_a_batch_has_standby_tokens_in_place_of_patches():
    batch = training_batch()
    view = standby_view(batch, CONFIG)
    assert view.bucket == Bucket(12 + 8, (0,), 1)
    assert (view.length == batch.length - np.array([8, 0, 8])).all()
    assert not view.image_id.any()
    assert view.feature_index[0, :12, 0].tolist() == [-1, *range(16, 24), -1, -1, -1]
    for labels, ids in ((batch.labels, batch.token_ids), (view.labels, view.token_ids)):
        assert (labels[0][labels[0] != IGNORE] == [5, 6, 7, 8, 9]).all()
        assert (ids[0][labels[0] != IGNORE] == [5, 6, 7, 8, 9]).all()
    for b, row in enumerate(batch.query_rows):
        assert view.token_ids[b, view.query_rows[b, 0]] == batch.token_ids[b, row[0]]
    hidden = embed(CONFIG, begun(), view, view.bucket.slots).hidden
    assert_close(hidden[0, 1:9], shown(begun(), batch.crops, np.zeros((3, 1), np.int32))[1][0, 0], 1e-5)


def test_stage_1_trains_the_new_arrays_and_stage_2_the_mean_of_both_losses():
    optimizer = make_optimizer(CONFIG, OptimizerRecipe(learning_rate=1e-2, warmup=0.0), 20)
    batch = training_batch()
    losses = jax.jit(lambda params, batches: [compute_loss(CONFIG, params, x)[0] / 12 for x in batches])
    focus, standby = map(float, losses(begun(), views(batch, CONFIG, "both")))
    expected = {"standby": standby, "both": (focus + standby) / 2}
    for mode, groups in (("standby", ("standby",)), ("both", ("standby", "llm"))):
        state = init_state(CONFIG, jax.tree.map(jnp.array, begun()), groups, optimizer, jnp.float32)
        before = jax.tree.map(np.array, state.trained)
        state, metrics = train_step(CONFIG, optimizer, state, views(batch, CONFIG, mode), dtype=jnp.float32)
        assert float(metrics.loss) == pytest.approx(expected[mode], rel=1e-5)
        trained = {name for name, tree in state.trained.items() if jax.tree.leaves(tree)}
        assert trained == ({"standby"} if mode == "standby" else {"standby", "embed", "stages", "norm", "head"})
        moved = jax.tree.map(lambda x, y: bool((x != y).any()), before["standby"], state.trained["standby"])
        assert moved["tokens"]["embedding"]
        assert all(jax.tree.leaves([moved["mlps"], moved["projector"]]))
        assert moved["temporal"]["attention"]["o"]["kernel"]  # it begins as zero, but it is trained


def test_the_recipes_of_both_stages():
    paths = ["model.start=s", "data.conversations=c", "run.folder=f"]
    first, second = (load_recipe(f"standby-stage{n}", paths) for n in (1, 2))
    assert (first.model.groups, first.data.image_mode) == (("standby",), "standby")
    assert (second.model.groups, second.data.image_mode) == (("vision", "standby", "projector", "llm"), "both")


def test_only_llava_towers_have_them():
    config = LlavaConfig.gemma3("4b")
    with pytest.raises(UserError, match="LLaVA's towers, but this model is of the family gemma3"):
        dataclasses.replace(config, standby=StandbyConfig())
    again = LlavaConfig.from_json(CONFIG.to_json())
    assert again == CONFIG
    with pytest.raises(UserError, match=r"standby\.tokens"):
        LlavaConfig.from_json({**CONFIG.to_json(), "standby": {"tokens": 7}})
