"""Tiny models and hand-built batches for the tests of the model."""

import dataclasses
import functools

import jax
import numpy as np

from pdrop_jax.batch import IGNORE, Batch, Bucket
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.model import vlm
from pdrop_jax.model.drop import TokenBuffer
from pdrop_jax.model.params import abstract_params, path_name
from pdrop_jax.schedule import DropSchedule

VOCAB = 64
CROP = 16  # pixels
IMAGE_TOKENS = 16  # of one crop: 4 x 4 patches of 4 pixels

VISION = VisionConfig(CROP, 4, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
MHA = TextConfig(VOCAB, 32, 48, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=8, max_length=128)
GQA = TextConfig(
    VOCAB,
    32,
    48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qkv_bias=True,
    output_bias=True,
    max_length=99,
)
TWO_DROPS = DropSchedule((1, 2), (0.6, 0.3))

forward = jax.jit(vlm.forward, static_argnames=("config", "implementation", "keep_hidden"))
prefill = jax.jit(vlm.prefill, static_argnames=("config", "new_slots", "implementation"))
decode_step = jax.jit(vlm.decode_step, static_argnames=("config",))


def llava_config(text=MHA, schedule=TWO_DROPS):
    return LlavaConfig(VISION, text, schedule)


@functools.cache
def params_of(config, dtype=np.float32):
    """Random parameters, norms and biases too, so that a forgotten one shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        around = 1.0 if path_name(path).endswith(".scale") else 0.0
        return (around + 0.2 * rng.standard_normal(leaf.shape)).astype(dtype)

    return jax.tree.map_with_path(draw, abstract_params(config))


def make_batch(rows, bucket, query_rows=None, labels=None, image_tokens=IMAGE_TOKENS):
    """A Batch from rows of token ids, where -n stands for an image of n tokens.

    The pictures are random; a row's m-th image takes the first n of the ``image_tokens`` features of its m-th crop.
    The query row is the last slot of each row if none is given.
    """
    B, S = len(rows), bucket.slots
    token_ids, image_id = np.zeros((2, B, S), np.int32)
    feature_index = np.full((B, S, 1), -1, np.int32)
    length = np.zeros(B, np.int32)
    for b, row in enumerate(rows):
        at = image = 0
        for item in row:
            if item >= 0:
                token_ids[b, at] = item
                at += 1
                continue
            feature_index[b, at : at - item, 0] = image * image_tokens + np.arange(-item)
            image += 1
            image_id[b, at : at - item] = image
            at -= item
        length[b] = at
    crops = np.random.default_rng(0).standard_normal((B, len(bucket.images), CROP, CROP, 3)).astype(np.float32)
    query_rows = length[:, None] - 1 if query_rows is None else np.asarray(query_rows, np.int32)
    return Batch(token_ids, feature_index, image_id, length, crops, query_rows, labels, bucket)


def training_batch():
    """Three rows: an answer behind a picture, text without a target, a picture amid text. Slot 0 is no target."""
    rows = [[1, -16, 5, 6, 7, 8, 9], [1, 5, 6], [1, 9, -16, 5, 6, 7, 8, 9, 4]]
    batch = make_batch(rows, Bucket(12, (16,)))
    labels = np.where(
        (batch.image_id == 0) & (np.arange(batch.bucket.slots) < batch.length[:, None]), batch.token_ids, IGNORE
    )
    labels[:, 0] = IGNORE
    labels[1] = IGNORE
    return dataclasses.replace(batch, labels=labels.astype(np.int32))


def row_of(batch, b):
    """Row ``b`` as a batch of its own, in the same bucket."""
    return jax.tree.map(lambda x: x[b : b + 1], batch)


def assert_close(ours, theirs, atol=1e-4):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=atol, rtol=0)


def make_buffer(batch, D=4, seed=0):
    """The batch's tokens before the first drop, with random hidden states."""
    B, S = batch.image_id.shape
    numbers = np.arange(len(batch.bucket.images) + 1)
    return TokenBuffer(
        hidden=np.random.default_rng(seed).standard_normal((B, S, D)).astype(np.float32),
        image_id=batch.image_id,
        index=np.tile(np.arange(S, dtype=np.int32), (B, 1)),
        length=batch.length,
        query_rows=batch.query_rows,
        image_count=(batch.image_id[:, None] == numbers[:, None]).sum(-1).astype(np.int32),
        labels=batch.labels,
    )
