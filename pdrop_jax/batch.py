"""Batch: ragged inputs laid out on the host as arrays of static shape."""

import dataclasses

import jax
import numpy as np

Array = jax.Array | np.ndarray

IGNORE = -100  # label of a slot that is not a target


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The static shape of a batch: ``text`` slots, and one full-size slot group for each of ``images``.

    ``images[m]`` is the largest number of tokens of the (m+1)-th image of a row, ``crops`` the largest number of crops
    of all images of a row together; by default one each. A crop is what a vision tower takes as a unit: a square
    picture, or a window of patches.
    """

    text: int
    images: tuple[int, ...] = ()
    crops: int = -1

    def __post_init__(self) -> None:
        if self.crops < 0:
            object.__setattr__(self, "crops", len(self.images))

    @property
    def slots(self) -> int:
        """S, the sequence slots of a row before any drop."""
        return self.text + sum(self.images)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """The input of a jitted function. Rows are left-aligned, padding is on the right.

    B rows, S = bucket.slots sequence slots, C = bucket.crops crops, Q query rows, T features per token.

    Attributes:
      token_ids: (B, S) int32, text ids; 0 at image slots and padding.
      feature_index: (B, S, T) int32, vectors of the row's feature pool that are used here; -1 for text and padding. The
        pool consists of the features of all crops, one after another; their features as frames of a video
        (``LlavaConfig.frame_tokens``); and the newline vector if the model has one. With DeepStack as many features of
        each earlier layer follow, which are not counted here.
      image_id: (B, S) int32, 0 for text and padding, m for a token of the row's m-th image.
      length: (B,) int32, valid slots.
      crops: (B, C, h, w, 3) float32, normalised pixels, or windows of patches (B, C, U, F); unused crops are zero. C
        may be 0.
      query_rows: (B, Q) int32, slots whose attention ranks the image tokens; -1 is unused.
      labels: (B, S) int32, the token id of every slot that is a target, IGNORE elsewhere, also at image slots and
        padding. Not shifted: slot i is predicted from the slots before it, and the loss shifts after the drops. None
        outside training.
      bucket: static; S and the length of every later buffer follow from it.
      feature_weight: (B, S, T) float32, how the features of a token are blended; None if T is 1.
      patch_layout: (B, C, U, 3 or 5) int32, where the patches of a window are (``families.qwen2_vl.tower``); None for
        crops.
      positions: (B, S, 3) int32, time, height and width of each token for M-RoPE; None without it.
      clips: (B, C) int32, crops with the same number are frames of one block (``model.standby``); None if no image of
        the batch has standby tokens. With it, the features of all crops' standby tokens stand behind those as frames.
      scores: (B, S) float32, the caller's scores for the score "given", the larger are kept; None otherwise.
    """

    token_ids: Array
    feature_index: Array
    image_id: Array
    length: Array
    crops: Array
    query_rows: Array
    labels: Array | None = None
    bucket: Bucket = dataclasses.field(default=Bucket(0), metadata={"static": True})
    feature_weight: Array | None = None
    scores: Array | None = None
    patch_layout: Array | None = None
    positions: Array | None = None
    clips: Array | None = None
