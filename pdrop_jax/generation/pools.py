"""What an engine keeps on the device between requests: image embeddings, and the first stage of prompts up to an image.

A pool is a tree of arrays with an entry for each picture or prefix, all of one size, made once. So the memory is known
before it is taken, and shapes never change. ``lru`` knows on the host which entry holds what.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pdrop_jax.batch import Batch
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.generation.engine import ROUNDED, Tree, placed
from pdrop_jax.model.cache import StageCache, empty_caches, grow
from pdrop_jax.model.decoder import DecoderOutput
from pdrop_jax.model.multi_turn import FirstStage, empty_first_stage
from pdrop_jax.model.params import Params
from pdrop_jax.model.quantization import stored_bytes
from pdrop_jax.model.scores import find_score
from pdrop_jax.model.vlm import ImageEmbeddings, embed_images


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Prefixes:
    """The first stage of E prompts up to the end of their last image, C slots each; it drops nothing.

    Attributes:
      cache: keys and values (L_0, E, K, C, H).
      output: of the stage, hidden (E, C, D).
    """

    cache: StageCache
    output: FirstStage


def _images(config: LlavaConfig, entries: int, tokens: int, dtype: DTypeLike) -> ImageEmbeddings:
    A, D = config.additions, config.text.hidden_size
    return placed(
        ImageEmbeddings(
            jnp.zeros((entries, tokens, D), dtype),
            jnp.zeros((entries, tokens, A, D), dtype) if A else None,
            jnp.zeros((entries, tokens), jnp.float32) if find_score(config).class_attention else None,
        )
    )


def _prefixes(config: LlavaConfig, entries: int, slots: int, dtype: DTypeLike) -> Prefixes:
    cache = empty_caches(config, entries, dtype)[0]
    assert cache is not None
    return placed(Prefixes(grow(cache, slots), empty_first_stage(config, entries, slots, dtype)))


# (config, entries, tokens or slots of each, dtype) -> a pool of zeros.
empty_images = jax.jit(_images, static_argnums=(0, 1, 2, 3))
empty_prefixes = jax.jit(_prefixes, static_argnums=(0, 1, 2, 3))


def pool_bytes(empty: Any, config: LlavaConfig, entries: int, size: int, dtype: DTypeLike) -> int:
    """Bytes of the pool that ``empty`` makes of these arguments."""
    pool = jax.eval_shape(functools.partial(empty, config, entries, size, dtype))
    return stored_bytes(pool)


def insert(entries: jax.Array, old: Tree, new: Tree) -> Tree:
    """A state or a pool with the rows of ``new``, padded with zeros to its size, in ``entries`` (R,) int32.

    All of an entry is overwritten: what an earlier answer left there may be no number, and would be one of the products
    in which the mask's zeros are factors.
    """

    def write(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        sizes = [(0, 0 if n == axis else a - b) for n, (a, b) in enumerate(zip(old.shape, new.shape, strict=True))]
        if any(after for _, after in sizes):
            new = jnp.pad(new, sizes)
        for r in range(new.shape[axis]):  # an update of one row needs no copy, wherever it is
            row = jax.lax.slice_in_dim(new, r, r + 1, axis=axis)
            old = jax.lax.dynamic_update_slice_in_dim(old, row, entries[r], axis)
        return old

    def write_part(old: Any, new: Any) -> Any:
        axis = 1 if isinstance(old, StageCache) else 0  # caches have layers in front
        return jax.tree.map(functools.partial(write, axis=axis), old, new)

    return placed(jax.tree.map(write_part, old, new, is_leaf=lambda x: isinstance(x, StageCache)))


@functools.partial(
    jax.jit, static_argnames=("config", "implementation"), donate_argnames=("pool",), compiler_options=ROUNDED
)
def encode(
    config: LlavaConfig,
    params: Params,
    pool: ImageEmbeddings,
    image: Batch,
    entry: jax.Array,
    *,
    implementation: Implementation = "auto",
) -> ImageEmbeddings:
    """The pool with the image that is all of the batch ``image``, one row, in ``entry`` (1,). Consumes ``pool``."""
    new = embed_images(config, params, image, implementation)
    return insert(entry, pool, new)


def images_of(pool: ImageEmbeddings, entries: jax.Array, image_id: jax.Array) -> ImageEmbeddings:
    """The image tokens of a batch from the entries of its images.

    Args:
      entries: (B, M) int32.
      image_id: (B, S) int32, see ``Batch``.
    """
    own = image_id[..., None] == jnp.arange(1, entries.shape[1] + 1)  # (B, S, M)
    place = jnp.where(own, jnp.cumsum(own, axis=1) - 1, 0).sum(-1)  # of a token in its image; its parts may be apart
    entry = jnp.take_along_axis(entries, jnp.maximum(image_id - 1, 0), axis=1)

    def pick(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.reshape(image_id > 0, image_id.shape + (1,) * (x.ndim - 2)), x[entry, place], 0)

    return jax.tree.map(pick, pool)


def remember(pool: Prefixes, entries: jax.Array, output: DecoderOutput) -> Prefixes:
    """The pool with the first stage of a prefill in ``entries`` (R,)."""
    first, cache = output.first, output.state.caches[0]
    assert first is not None
    assert cache is not None
    new = Prefixes(cache, FirstStage(first.hidden, None if pool.output.additions is None else first.additions))
    return insert(entries, pool, new)


def recall(pool: Prefixes, entries: jax.Array, slots: int) -> tuple[StageCache, FirstStage]:
    """The first ``slots`` slots of ``entries`` (R,)."""
    return (
        jax.tree.map(lambda x: x[:, entries, :, :slots], pool.cache),
        jax.tree.map(lambda x: x[entries, :slots], pool.output),
    )
