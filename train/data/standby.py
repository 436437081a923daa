"""Training batches whose pictures are shown by their standby tokens, made of batches that show all patches."""

import dataclasses

import numpy as np

from pdrop_jax.batch import IGNORE, Batch, Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.train.recipe import ImageMode


def views(batch: Batch, config: LlavaConfig, mode: ImageMode) -> Batch | tuple[Batch, Batch]:
    """What a step is given: all patches, the standby tokens, or one batch of each, which have the same targets."""
    if mode == "focus":
        return batch
    standby = standby_view(batch, config)
    return standby if mode == "standby" else (batch, standby)


def standby_view(batch: Batch, config: LlavaConfig) -> Batch:
    """``batch``, a numpy batch, with the m standby tokens of a picture in place of its other tokens.

    A picture in tiles is shown by those of its overview. Example, m = 2, x a patch and s a standby token::

        1 x x x x 5 6   ->   1 s s 5 6
    """
    m, T = config.standby_tokens, batch.feature_index.shape[2]
    images, C = len(batch.bucket.images), batch.bucket.crops
    bucket = Bucket(batch.bucket.text + m * images, (0,) * images, C)
    B, S = len(batch.length), bucket.slots
    token_ids, length = np.zeros((B, S), np.int32), np.zeros(B, np.int32)
    feature_index, labels = np.full((B, S, T), -1, np.int32), np.full((B, S), IGNORE, np.int32)
    query_rows = np.array(batch.query_rows)
    for b, n in enumerate(np.asarray(batch.length)):
        image = np.asarray(batch.image_id)[b, :n]
        first = (image > 0) & (np.diff(image, prepend=0) != 0)
        size = np.where(first, m, image == 0)
        source, stop = np.repeat(np.arange(n), size), np.cumsum(size)
        end = length[b] = len(source)
        crop = np.asarray(batch.feature_index)[b, source, 0] // config.image_tokens
        place = np.arange(end) - (stop - size)[source]
        index = C * (config.image_tokens + config.frame_tokens) + crop * m + place
        token_ids[b, :end] = np.asarray(batch.token_ids)[b, source]
        feature_index[b, :end] = np.where(image[source] > 0, index, -1)[:, None]
        if batch.labels is not None:
            labels[b, :end] = np.asarray(batch.labels)[b, source]
        used = query_rows[b] >= 0
        query_rows[b, used] = stop[query_rows[b, used]] - 1
    weight = None
    if batch.feature_weight is not None:
        weight = np.zeros((B, S, T), np.float32)
        weight[..., 0] = 1
    return dataclasses.replace(
        batch,
        token_ids=token_ids,
        feature_index=feature_index,
        image_id=np.zeros((B, S), np.int32),
        length=length,
        query_rows=query_rows,
        labels=None if batch.labels is None else labels,
        bucket=bucket,
        feature_weight=weight,
        clips=np.tile(np.arange(C, dtype=np.int32), (B, 1)),
    )
