"""Token-scoring functions, selected by ``DropSchedule.score``.

A score looks at a ``drop.Boundary`` and gives every slot a number; the tokens of each image with the largest are kept:

=============  =========================================================================================================
pyramiddrop    attention of the query rows in the next layer (PyramidDrop, section 3.2)
fastv          attention of the query rows in the last layer that ran (FastV, section 4)
feather        as pyramiddrop without rope, softmax over image tokens only; the first drop also keeps every third token
               of every third line of patches (FEATHER, section 5)
v2drop         how far the last layer moved the hidden state, L2 norm (V2Drop)
last_text      as pyramiddrop, with the last text token up to each query row as the query
all_text       as pyramiddrop, with every text token that is not a target as a query
norm           L2 norm of the hidden state
random         a random number for each token, from the schedule's seed and the row's text
none           no score: all image tokens are dropped (early exit)
cls            attention of the vision tower's class token in its last layer, mean over heads
given          ``Batch.scores``
quota          weighted sum of magnitude, attention of text and of image tokens, and quantization residual (QUOTA, a
               reconstruction: ``quota``)
=============  =========================================================================================================
"""

import dataclasses
import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.drop import Boundary, attention_scores, next_attention, pyramiddrop_score
from pdrop_jax.model.quota import quota, text_rows

GRID = 3  # FEATHER's stride


Rank = Callable[[Boundary], jax.Array]
Precompute = Callable[[LlavaConfig, Batch, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """A way to rank image tokens.

    Attributes:
      rank: ``drop.Boundary`` -> (B, S) float32, the larger is kept; only slots of one image are compared. No gradient
        flows through.
      precompute: the part that is known before the decoder, ``(config, batch, attention) -> (B, S) float32``, found in
        ``buffer.precomputed_scores``; ``attention`` is the class token's, (B, S) float32, or None.
      last_layer: whether ``rank`` needs ``last_layer`` and ``last_input``.
      class_attention: whether ``precompute`` needs ``attention``.
    """

    rank: Rank
    precompute: Precompute | None = None
    last_layer: bool = False
    class_attention: bool = False

    @property
    def of_stage_output(self) -> bool:
        """Whether a stage's output and the batch are all that it needs, so that a cached stage can be ranked again."""
        return not (self.last_layer or self.class_attention or self.precompute is given)


def fastv(at: Boundary) -> jax.Array:
    assert at.last_layer is not None
    assert at.last_input is not None
    return attention_scores(
        at.config.text,
        at.last_layer,
        at.last_input,
        at.buffer.query_rows,
        at.last_rope,
        layer=at.layer - 1,
        places=at.places,
    )


def feather(at: Boundary) -> jax.Array:
    buffer, among = at.buffer, at.buffer.image_id > 0
    scores = next_attention(at, buffer.query_rows, rotated=False, past=False, among=among)
    return scores if at.number else scores + precomputed(at)  # attention is never above 1


def v2drop(at: Boundary) -> jax.Array:
    assert at.last_input is not None
    change = at.buffer.hidden.astype(jnp.float32) - at.last_input.astype(jnp.float32)
    return jnp.linalg.norm(change, axis=-1)


def last_text(at: Boundary) -> jax.Array:
    slot = jnp.arange(at.buffer.slots)
    text = jnp.where(at.buffer.image_id == 0, slot, -1)  # (B, S)
    last = jax.lax.cummax(text, axis=1)  # the last text slot up to each slot
    rows = at.buffer.query_rows
    rows = jnp.where(rows < 0, -1, jnp.take_along_axis(last, jnp.maximum(rows, 0), axis=1))
    return next_attention(at, rows)


def all_text(at: Boundary) -> jax.Array:
    return next_attention(at, text_rows(at.buffer))


def norm(at: Boundary) -> jax.Array:
    return jnp.linalg.norm(at.buffer.hidden.astype(jnp.float32), axis=-1)


def none(at: Boundary) -> jax.Array:
    return jnp.zeros(at.buffer.image_id.shape, jnp.float32)


def precomputed(at: Boundary) -> jax.Array:
    assert at.buffer.precomputed_scores is not None
    return at.buffer.precomputed_scores


def noise(config: LlavaConfig, batch: Batch, attention: jax.Array | None) -> jax.Array:
    """Uniform in 0..1. The key of a row depends on its own text, so it keeps the same tokens in any batch."""
    ids = jnp.asarray(batch.token_ids).astype(jnp.uint32)
    text = (ids * (2 * jnp.arange(ids.shape[1], dtype=jnp.uint32) + 1)).sum(1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.schedule.seed), text)
    return jax.vmap(lambda key: jax.random.uniform(key, ids.shape[1:]))(keys)


def grid(config: LlavaConfig, batch: Batch, attention: jax.Array | None) -> jax.Array:
    """1 at tokens on every third line and column of their crop's patches, or of their picture's, from the first."""
    if batch.positions is not None:
        return _grid_of_positions(jnp.asarray(batch.positions), jnp.asarray(batch.image_id), len(batch.bucket.images))
    index = jnp.asarray(batch.feature_index)[..., 0]  # a blended token is where its first feature is
    side, features = config.crop_tower.features_a_side, config.image_tokens
    patch = index % features - (features - side**2)  # a class token, where it is kept, has no place in the grid
    here = (index >= 0) & (index < batch.bucket.crops * features) & (patch >= 0)
    return (here & (patch // side % GRID == 0) & (patch % side % GRID == 0)).astype(jnp.float32)


def _grid_of_positions(positions: jax.Array, image_id: jax.Array, images: int) -> jax.Array:
    """``grid`` from M-RoPE's positions (B, S, 3), which count lines and columns from an image's first token on."""
    on = jnp.zeros(image_id.shape, bool)
    for image in range(1, images + 1):
        of_image = image_id == image
        first = jnp.where(of_image[..., None], positions, jnp.iinfo(jnp.int32).max).min(1, keepdims=True)
        on |= of_image & ((positions - first)[..., 1:] % GRID == 0).all(-1)
    return on.astype(jnp.float32)


def class_attention(config: LlavaConfig, batch: Batch, attention: jax.Array | None) -> jax.Array:
    assert attention is not None
    return attention


def given(config: LlavaConfig, batch: Batch, attention: jax.Array | None) -> jax.Array:
    if batch.scores is None:
        raise UserError("score 'given' needs Batch.scores, which this batch does not have")
    return jnp.asarray(batch.scores, jnp.float32)


SCORES: dict[str, TokenScore] = {
    "pyramiddrop": TokenScore(pyramiddrop_score),
    "fastv": TokenScore(fastv, last_layer=True),
    "feather": TokenScore(feather, precompute=grid),
    "v2drop": TokenScore(v2drop, last_layer=True),
    "last_text": TokenScore(last_text),
    "all_text": TokenScore(all_text),
    "norm": TokenScore(norm),
    "random": TokenScore(precomputed, precompute=noise),
    "none": TokenScore(none),
    "cls": TokenScore(precomputed, precompute=class_attention, class_attention=True),
    "given": TokenScore(precomputed, precompute=given),
    "quota": TokenScore(quota),
}


def register_score(name: str, score: TokenScore | Rank) -> None:
    """Registers a score under ``name``, for ``DropSchedule(score=name)``. Compiled programs know a score by its name.

    Example::

        register_score("negative_norm", lambda at: -jnp.linalg.norm(at.buffer.hidden, axis=-1))

    Raises:
      UserError: the name is taken.
    """
    if name in SCORES:
        raise UserError(f"score {name!r} is already registered: choose another name")
    SCORES[name] = score if isinstance(score, TokenScore) else TokenScore(score)


def find_score(config: LlavaConfig) -> TokenScore:
    """The score that the schedule names.

    Raises:
      UserError: it is unknown, or needs something that the model or schedule lacks.
    """
    name = config.schedule.score
    if name not in SCORES:
        near = difflib.get_close_matches(name, SCORES, 1)
        raise UserError(
            f"unknown score {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"one of {', '.join(SCORES)}")
        )
    score = SCORES[name]
    if score.last_layer and 0 in config.schedule.layers:
        raise UserError(f"score {name!r} needs the layer before a drop, and there is none before layer 0")
    if score.class_attention and not config.vision.class_tokens:
        raise UserError(f"score {name!r} needs a class token, and a {config.vision.kind} tower has none")
    if score.class_attention and config.family != "LLaVA":
        raise UserError(f"score {name!r} needs a token for each patch, and an {config.family} model merges patches")
    return score
