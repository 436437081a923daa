"""Lays out rows of token ids and images as the arrays of a Batch."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pdrop_jax.batch import IGNORE, Batch, Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.anyres import NEWLINE, ImageTokens
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch before it is laid out.

    Attributes:
      ids: token ids; IMAGE_PLACEHOLDER stands for an image or for a part of it.
      images: in the order of their placeholders, see ``ImageTokens.parts``.
      labels: for training: the id itself at each target in ``ids``, IGNORE elsewhere.
    """

    ids: Sequence[int] | np.ndarray
    images: Sequence[ImageTokens] = ()
    labels: Sequence[int] | np.ndarray | None = None


def assemble(rows: Sequence[Row], config: LlavaConfig, bucket: Bucket, queries: int = 1) -> Batch:
    """Lays out rows as the arrays of a Batch: B = len(rows), Q = queries.

    The crops of a row's images are concatenated. B is not rounded up: each new B costs one compilation.

    Without labels the query row is the last slot of the prompt. The batch has labels if any row has. Then the query
    rows of a row are the slots right before each run of targets, or its last text slot if it has no target.

    Raises:
      UserError: there are no rows, a row is empty or does not fit the bucket, the numbers of placeholders and images or
        of ids and labels differ, a crop does not have the vision tower's size, or an id is outside the vocabulary.
    """
    if not rows:
        raise UserError("a batch needs at least one prompt, got none")
    B, S, C = len(rows), bucket.slots, bucket.crops
    T = max([config.features_per_token, *(image.index.shape[1] for row in rows for image in row.images)])
    token_ids = np.zeros((B, S), np.int32)
    feature_index = np.full((B, S, T), -1, np.int32)
    feature_weight = np.zeros((B, S, T), np.float32)
    image_id = np.zeros((B, S), np.int32)
    length = np.zeros(B, np.int32)
    crops = np.zeros((B, C, *config.vision.crop_shape), np.float32)
    layout = positions = None
    if config.vision.layout_values:
        layout = np.zeros((B, C, config.vision.crop_shape[0], config.vision.layout_values), np.int32)
    if config.text.mrope_sections:
        positions = np.zeros((B, S, 3), np.int32)
    clips = np.zeros((B, C), np.int32) if any(image.standby for row in rows for image in row.images) else None
    crop_features = config.vision.crop_features + config.keep_class_token
    beyond = crop_features + config.frame_tokens  # of a crop, in front of the standby tokens
    newline = C * (beyond + (0 if clips is None else config.standby_tokens))
    query_rows = np.full((B, queries), -1, np.int32)
    labels = np.full((B, S), IGNORE, np.int32) if any(row.labels is not None for row in rows) else None
    for b, row in enumerate(rows):
        _check_row(b + 1, row, config, bucket)
        ids, images = expand(row.ids, [[len(image) // image.parts] * image.parts for image in row.images])
        n = length[b] = len(ids)
        token_ids[b, :n], image_id[b, :n] = ids, images
        if positions is not None:
            positions[b, :n] = mrope_positions(row)
        used = frames = 0
        for m, image in enumerate(row.images, 1):
            index, feature_weight[b, :n][images == m] = image.widened(T)
            first, features = 0, crop_features
            if image.video and config.frame_tokens and not image.standby:
                first, features = C * features, config.frame_tokens
            index = np.where(index == NEWLINE, newline, first + used * features + index)
            if clips is not None:
                clips[b, used : used + len(image.crops)] = clip_numbers(image, config) + clips[b].max() + 1
                own = slice(len(image) - image.standby, None)
                index[own] += C * beyond + used * config.standby_tokens - first - used * features
                image_id[b, np.flatnonzero(images == m)[own]] = 0  # as text, they are never dropped
            feature_index[b, :n][images == m] = index
            crops[b, used : used + len(image.crops)] = image.crops
            if layout is not None and image.layout is not None:
                here = layout[b, used : used + len(image.crops)]
                here[...] = image.layout
                here[..., 2] += np.where(image.layout[..., 2] > 0, frames, 0)  # frames count through the row
                frames += image.layout[..., 2].max()
            used += len(image.crops)
        found = np.array([n - 1])
        if labels is not None:
            if row.labels is not None:
                labels[b, :n][images == 0] = np.asarray(row.labels, np.int32)[np.asarray(row.ids) != IMAGE_PLACEHOLDER]
            found = _query_rows(labels[b, :n], images)
        if len(found) > queries:
            raise UserError(
                f"prompt {b + 1} has {len(found)} runs of targets, but its batch holds {queries}: raise queries"
            )
        query_rows[b, : len(found)] = found
    return Batch(
        token_ids=token_ids,
        feature_index=feature_index,
        image_id=image_id,
        length=length,
        crops=crops,
        query_rows=query_rows,
        labels=labels,
        bucket=bucket,
        feature_weight=feature_weight if T > 1 else None,
        patch_layout=layout,
        positions=positions,
        clips=clips,
    )


def clip_numbers(image: ImageTokens, config: LlavaConfig) -> np.ndarray:
    """Blocks of the frames of a video, from 0 on; otherwise each crop is alone."""
    frames = np.arange(len(image.crops), dtype=np.int32)
    return frames // config.standby.frames if image.video and config.standby else frames


def mrope_positions(row: Row) -> np.ndarray:
    """Time, height and width of each token of a row, (n, 3) int32 (Qwen2-VL, section 2.1).

    The three are equal for text. An image starts where the text before it ends, and the text behind it continues after
    as many positions as the image's longer side has tokens. Example, an image of 2 x 3 tokens between two words::

        time    0   1 1 1 1 1 1   4
        height  0   1 1 1 2 2 2   4
        width   0   1 2 3 1 2 3   4
    """
    parts = (part for image in row.images for part in _positions_of_parts(image))
    found, start = [], 0
    for token in np.asarray(row.ids):
        if token == IMAGE_PLACEHOLDER:
            positions, extent = next(parts)
            found.append(positions + start)
            start += extent
        else:
            found.append(np.full((1, 3), start, np.int32))
            start += 1
    return np.concatenate(found)


def _positions_of_parts(image: ImageTokens) -> list[tuple[np.ndarray, int]]:
    """Positions of each part of an image, (n, 3) from its own start, and how many the part takes."""
    assert image.positions is not None
    return [(positions, image.extent) for positions in np.split(image.positions, image.parts)]


def expand(ids: Sequence[int] | np.ndarray, sizes: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Expands each placeholder to the slots of its image, or of its part of the image.

    For ``[1, 7, -200, 8]`` and an image of 3 tokens::

      token_ids  1  7  0  0  0  8
      image_id   0  0  1  1  1  0

    Args:
      sizes: number of tokens of each part of each image.

    Returns:
      token_ids and image_id of one row, int32, both of the expanded length.
    """
    row = np.asarray(ids, np.int32)
    is_image = row == IMAGE_PLACEHOLDER
    slots = np.ones(len(row), int)
    slots[is_image] = [size for parts in sizes for size in parts]
    owner = np.zeros(len(row), int)
    owner[is_image] = np.repeat(np.arange(1, len(sizes) + 1), [len(parts) for parts in sizes])
    in_image = np.repeat(is_image, slots)
    token_ids = np.where(in_image, 0, np.repeat(row, slots))
    return token_ids.astype(np.int32), np.repeat(owner, slots).astype(np.int32)


def _query_rows(labels: np.ndarray, image_id: np.ndarray) -> np.ndarray:
    """Slots right before a run of targets, ascending; the last text slot if there is no run. Both arguments (n,) int32.

    A target in slot 0 starts no run, because no slot precedes it.
    """
    target = labels != IGNORE
    found = np.flatnonzero(target[1:] & ~target[:-1])
    if len(found):
        return found
    text = np.flatnonzero(image_id == 0)
    return text[-1:] if len(text) else np.array([len(labels) - 1])


def _check_row(number: int, row: Row, config: LlavaConfig, bucket: Bucket) -> None:
    ids, shape, vocab_size = np.asarray(row.ids), config.vision.crop_shape, config.text.vocab_size
    placeholders = int((ids == IMAGE_PLACEHOLDER).sum())
    text = ids[ids != IMAGE_PLACEHOLDER]
    if not len(ids):
        raise UserError(f"prompt {number} has no tokens")
    if row.labels is not None and len(row.labels) != len(ids):
        raise UserError(f"prompt {number} has {len(ids)} tokens but {len(row.labels)} labels")
    if placeholders != sum(image.parts for image in row.images):
        raise UserError(f"prompt {number} has {placeholders} image placeholders but {len(row.images)} pictures")
    n = len(text) + sum(image.standby for image in row.images)
    if n > bucket.text or len(row.images) > len(bucket.images):
        raise UserError(
            f"prompt {number} has {n} text tokens and {len(row.images)} images, but its bucket holds "
            f"{bucket.text} and {len(bucket.images)}"
        )
    tokens, crops = [image.size.tokens for image in row.images], sum(len(image.crops) for image in row.images)
    if crops > bucket.crops or any(n > most for n, most in zip(tokens, bucket.images, strict=False)):
        raise UserError(
            f"prompt {number} has images of {tokens} tokens in {crops} crops, but its bucket holds "
            f"{list(bucket.images)} in {bucket.crops}"
        )
    if len(text) and not 0 <= text.min() <= text.max() < vocab_size:
        raise UserError(
            f"prompt {number} has token ids {text.min()}..{text.max()} but the model knows 0..{vocab_size - 1}: "
            "the tokenizer belongs to another model"
        )
    for image in row.images:
        if image.crops.shape[1:] != shape:
            raise UserError(
                f"prompt {number} has crops of shape {image.crops.shape[1:]}, the vision tower takes {shape}"
            )
