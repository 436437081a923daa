"""Attention, and what each query sees.

Implementations: ``xla`` is the reference and handles everything; so does ``blocked``, which is faster on a CPU;
``cudnn`` is NVIDIA's flash attention; ``splash`` is the Pallas flash attention for TPUs. ``auto`` takes the platform's
own if it can handle the call and xla otherwise. A forced implementation that cannot raises an error.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pdrop_jax.config import Implementation
from pdrop_jax.errors import UserError
from pdrop_jax.model.cache import TILE, KeysOrValues, Quantized
from pdrop_jax.model.splash import splash_causal, splash_two_way
from pdrop_jax.sharding import platform

BLOCK = 128  # queries of one block of ``blocked``
SEGMENT_BLOCK = 512  # queries that ``segment_attention`` takes at once
# A tower of more tokens runs the kernel on a TPU: by the estimate both take as long with 577, and with 4096 the kernel
# saves four fifths of the tower's time.
LONGEST_TOWER = 1024


@jax.named_scope("attention")
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    length: jax.Array | None = None,
    window: int | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Scaled dot-product attention with the softmax in float32; query heads share key-value heads if N > K.

    Args:
      q: (B, T, N, H).
      k: (B, S, K, H), already rotated, as is q.
      v: (B, S, K, H).
      causal: query t sees keys 0..t; T must equal S.
      length: (B,) int32, keys from ``length[b]`` on are not seen; None is S.
      window: with ``causal``, query t sees keys t - window + 1 .. t (Mistral, section 2); None is all up to t.
      implementation: see the top of this module.

    Returns:
      (B, T, N, H), dtype of q. Rows of padding queries are finite and meaningless.

    Raises:
      UserError: the forced implementation cannot handle this call.
    """
    chosen = _choose(q, causal, length) if implementation == "auto" else implementation
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal attention needs as many queries as keys, got {q.shape[1]} and {k.shape[1]}")
    if window is not None and not causal:
        raise ValueError("a sliding window is for causal attention")
    if window is not None and window >= k.shape[1]:
        window = None  # hides nothing
    if chosen == "splash" and not causal and length is not None:
        raise UserError("splash attention hides no padding from two-way attention: use implementation='xla'")
    if chosen == "splash":
        return splash_causal(q, k, v, window) if causal else splash_two_way(q, k, v)
    if chosen == "blocked":
        return _blocked(q, k, v, causal, length, window)
    if chosen == "cudnn" and (q.dtype not in (jnp.bfloat16, jnp.float16) or platform() != "gpu"):
        raise UserError(
            f"cudnn attention needs bfloat16 or float16 on a GPU, got {q.dtype} on {platform()}: "
            "use implementation='xla'"
        )
    # A padding query far behind the valid keys has only padding in its window: were that hidden, it would have no key.
    # From valid queries the causal mask hides padding anyway.
    length = length if window is None else None

    def call(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array | None) -> jax.Array:
        return _dot_product(q, k, v, length, causal, window, chosen)

    def even(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array | None) -> jax.Array:
        return _even(q, k, v, length, causal, window, chosen)

    if chosen == "cudnn" and (q.shape[1] % 2 or k.shape[1] % 2):
        return _unless_differentiated(call, even)(q, k, v, length)  # cuDNN has no gradient of odd lengths
    return call(q, k, v, length)


def attention_mask(
    query: jax.Array, key: jax.Array, *, causal: bool = True, window: int | None = None, length: jax.Array | None = None
) -> jax.Array:
    """Which keys each query sees, (B, T, S) bool; B is 1 where all rows are alike.

    Args:
      query: (T,) or (B, T) int32, slots of the queries.
      key: (S,) int32, slots of the keys.
      causal: a query sees no key behind its own slot.
      window: a query sees the last ``window`` keys up to its own slot; None is all.
      length: (B,) int32, keys from ``length[b]`` on are not seen.

    Example, queries and keys 0..3, ``window=2``::

        1 . . .
        1 1 . .
        . 1 1 .
        . . 1 1
    """
    query = query.reshape(-1, query.shape[-1], 1)
    seen = key <= query if causal else jnp.ones((*query.shape[:2], len(key)), bool)
    if window is not None:
        seen &= key > query - window
    if length is not None:
        seen &= key < length[:, None, None]
    return seen


@jax.named_scope("attention")
def attend_cache(
    q: jax.Array, k: KeysOrValues, v: KeysOrValues, first: jax.Array, window: int | None = None
) -> jax.Array:
    """``attention`` of new tokens to a cache that holds them already: each sees the slots up to its own.

    They are taken in blocks, as in ``blocked``, or their scores would fill the memory. A decode step's single token has
    ``decode_attention.attend_token``, except in a stream.

    Args:
      q: (B, T, N, H).
      k: (B, K, C, H), one layer of a cache.
      v: (B, K, C, H).
      first: (B,) int32, slot of a row's first new token.
      window: how many slots a token sees, its own included; None is all.

    Returns:
      (B, T, N, H), dtype of q.
    """
    C = jax.tree.leaves(k)[0].shape[2]
    window = None if window is None or window >= C else window

    def seen(start: int, stop: int) -> jax.Array:
        return attention_mask(first[:, None] + jnp.arange(start, stop), jnp.arange(C), window=window)

    return attend_masked(q, k, v, seen)


def attend_masked(q: jax.Array, k: KeysOrValues, v: KeysOrValues, seen: Callable[[int, int], jax.Array]) -> jax.Array:
    """``attend_cache`` with any mask: ``seen(start, stop)`` is that of these queries, (B, stop - start, C) bool."""
    B, T, N, H = q.shape
    K, C = jax.tree.leaves(k)[0].shape[1:3]
    q = q.reshape(B, T, K, N // K, H).swapaxes(1, 2)  # (B, K, T, G, H)
    blocks = []
    for start in range(0, T, BLOCK):
        block = q[:, :, start : start + BLOCK]
        # T and G are one axis: with two axes of size 1 XLA for CPUs takes a slower product.
        logits = cache_logits(block.reshape(B, K, -1, H), k).reshape(*block.shape[:-1], C)
        mask = seen(start, start + block.shape[2])[:, None, :, None]
        probs = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1).reshape(B, K, -1, C)
        blocks.append(weighted_values(probs, v, q.dtype, q.dtype).reshape(block.shape))
    return jnp.concatenate(blocks, axis=2).swapaxes(1, 2).reshape(B, T, N, H)


def cache_logits(q: jax.Array, k: KeysOrValues) -> jax.Array:
    """(B, K, Q, H) and keys as a cache has them (B, K, C, H) -> (B, K, Q, C) float32.

    Quantized keys are the integers of the product; the scale of a key's slot is applied to its logits.
    """
    k, scale = _with_scale(k, q.dtype)
    logits = jnp.einsum("BKQH,BKCH->BKQC", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return logits if scale is None else logits * scale


def weighted_values(probs: jax.Array, v: KeysOrValues, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """(B, K, Q, C) float32 and values as a cache has them (B, K, C, H) -> (B, K, Q, H).

    Multiplied in ``dtype``, summed into ``result``. Quantized values are the integers of the product; the scale of a
    slot is applied to its probabilities.
    """
    v, scale = _with_scale(v, dtype)
    probs = (probs if scale is None else probs * scale).astype(v.dtype)
    return jnp.einsum("BKQC,BKCH->BKQH", probs, v, preferred_element_type=result)


def _with_scale(x: KeysOrValues, dtype: DTypeLike) -> tuple[jax.Array, jax.Array | None]:
    """Keys or values (B, K, C, H) of a cache, and their scales (B, K, 1, C) if they are quantized."""
    return (x.qvalue.astype(dtype), x.scale[:, :, None]) if isinstance(x, Quantized) else (x, None)


def _dot_product(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array | None,
    causal: bool,
    window: int | None,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        key_value_seq_lengths=length,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def _even(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array | None, causal: bool, *options: Any) -> jax.Array:
    """``_dot_product`` with a query and a key of padding where their number is odd."""
    T, S = q.shape[1], k.shape[1]
    if length is None and not causal:
        length = jnp.full(len(q), S, jnp.int32)  # hides the padding, as the causal mask does
    q, k, v = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (q, k, v))
    return _dot_product(q, k, v, length, causal, *options)[:, :T]


def _unless_differentiated(call: Callable[..., jax.Array], otherwise: Callable[..., jax.Array]) -> Any:
    """``call``, but ``otherwise``, which gives the same, in a computation that is differentiated.

    Neither may have defaults: custom_vjp would take them for operands.
    """
    function = jax.custom_vjp(call)
    function.defvjp(lambda *operands: jax.vjp(otherwise, *operands), lambda vjp, cotangent: vjp(cotangent))
    return function


@jax.named_scope("attention")
def segment_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, implementation: Implementation = "auto"
) -> jax.Array:
    """Two-way attention among the tokens of a segment, such as the patches of one picture in a buffer of several.

    Few tokens are taken at once. More are taken in blocks one after the other, or their scores would fill the memory,
    and on a TPU or a GPU by the flash kernel.

    Args:
      q, k, v: (B, T, N, H).
      segment: (B, T) int32; padding is a segment of its own, so that every query sees a key.
      implementation: "splash" or "cudnn", or "auto" where they run, takes the flash kernel for more than SEGMENT_BLOCK
        tokens. cuDNN's runs where nothing is differentiated.

    Returns:
      (B, T, N, H), dtype of v.
    """
    T = q.shape[1]
    if T <= SEGMENT_BLOCK:
        return _segment_blocks(q, k, v, segment)
    if _is_splash(implementation):
        return splash_two_way(q, k, v, segment)
    if implementation == "cudnn" or (implementation == "auto" and _choose(q, False, None) == "cudnn"):
        return _unless_differentiated(_segment_cudnn, _segment_blocks)(q, k, v, segment)
    return _segment_blocks(q, k, v, segment)


def _segment_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
    seen = segment[:, None, :, None] == segment[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen, implementation="cudnn")


def _segment_blocks(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
    B, T, _, H = q.shape
    size = math.gcd(T, SEGMENT_BLOCK)

    def of_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:  # (B, size, N, H) and (B, size)
        rows, own = block
        logits = jnp.einsum("BTNH,BSNH->BNTS", rows, k, preferred_element_type=jnp.float32) * H**-0.5
        seen = own[:, None, :, None] == segment[:, None, None]
        probs = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("BNTS,BSNH->BTNH", probs, v)

    if size == T:
        return of_block((q, segment))
    blocks = (x.reshape(B, T // size, size, *x.shape[2:]).swapaxes(0, 1) for x in (q, segment))
    return jax.lax.map(jax.checkpoint(of_block), tuple(blocks)).swapaxes(0, 1).reshape(q.shape)


def aligned(implementation: Implementation) -> int:
    """Buffer lengths are rounded up to a multiple of this: on a TPU to whole tiles, elsewhere not at all."""
    return TILE if _is_splash(implementation) else 1


def _is_splash(implementation: Implementation) -> bool:
    return implementation == "splash" or (implementation == "auto" and platform() == "tpu")


def _choose(q: jax.Array, causal: bool, length: jax.Array | None) -> Literal["xla", "blocked", "cudnn", "splash"]:
    where = platform()
    if where == "cpu":
        return "blocked"
    if where == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[1] > 1 and q.shape[-1] % 8 == 0:
        return "cudnn"
    if where == "tpu" and (causal or (length is None and q.shape[1] > LONGEST_TOWER)):
        return "splash"
    return "xla"


def _blocked(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, length: jax.Array | None, window: int | None
) -> jax.Array:
    """Exact softmax, a block of queries at a time, against no key that all of the block cannot see.

    Half of the causal square is never computed, and a block's scores stay in the processor's cache between the
    products.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # (B, K, G, T, H)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # (B, K, S, H)
    blocks = []
    for start in range(0, T, BLOCK):
        rows = slice(start, min(start + BLOCK, T))
        keys = slice(max(0, start - window + 1) if window else 0, rows.stop if causal else S)
        logits = jnp.einsum("BKGTH,BKSH->BKGTS", q[:, :, :, rows], k[:, :, keys], preferred_element_type=jnp.float32)
        query, key = jnp.arange(rows.start, rows.stop), jnp.arange(keys.start, keys.stop)
        # A valid query stands before all padding, so the causal mask hides the padding already.
        seen = attention_mask(query, key, causal=causal, window=window, length=None if causal else length)
        logits = jnp.where(seen[:, None, None], logits * H**-0.5, -jnp.inf)
        probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        blocks.append(jnp.einsum("BKGTS,BKSH->BKGTH", probs, v[:, :, keys]))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
