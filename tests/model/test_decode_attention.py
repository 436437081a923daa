"""A decode step's attention and write, beside a token that is written first and then attends to the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_close

from pdrop_jax.model import decode_attention
from pdrop_jax.model.attention import attend_cache
from pdrop_jax.model.cache import StageCache, as_cached, scatter_token, write_in_tiles, write_tokens
from pdrop_jax.model.decode_attention import attend_token, read_sizes, seen_slots

LAYERS, ROWS, HEADS, C, H = 3, 4, 2, 600, 8
SLOTS = jnp.array([0, 3, 300, 599])  # an empty cache, and one with a single slot left


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def caches(bits, dtype=jnp.float32):
    """A cache and new tokens for it, (L, B, K, C, H) and (L, B, 1, K, H)."""
    pairs = [draw(LAYERS, ROWS, HEADS, C, H, seed=n, dtype=dtype) for n in (0, 1)]
    new = [draw(LAYERS, ROWS, 1, HEADS, H, seed=n, dtype=dtype) for n in (2, 3)]
    return StageCache(*(as_cached(x, bits) for x in pairs)), StageCache(*(as_cached(x, bits) for x in new))


def written_first(q, cache, new, slot, window=None):
    """``attend_token`` in the plain way."""
    one = jax.tree.map(lambda x: x[1], new)
    return attend_cache(q, *write_tokens(cache, 1, one.k, one.v, slot).layer(1), slot, window)


@pytest.mark.parametrize("on", ["cpu", "tpu"])
@pytest.mark.parametrize("window", [None, 5, 400])
@pytest.mark.parametrize("bits", [None, "int8"])
@pytest.mark.parametrize("N", [HEADS, 3 * HEADS])
def test_a_token_beside_the_cache_or_in_it_attends_alike(N, bits, window, on, monkeypatch):
    monkeypatch.setattr(decode_attention, "platform", lambda: on)
    cache, new = caches(bits)
    q, one = draw(ROWS, 1, N, H, seed=4), jax.tree.map(lambda x: x[1], new)
    expected, seen = written_first(q, cache, new, SLOTS, window), seen_slots(SLOTS, C, window)
    assert_close(attend_token(q, cache, 1, SLOTS, seen, one), expected, atol=1e-6)
    held = write_tokens(cache, 1, one.k, one.v, SLOTS)
    assert_close(attend_token(q, held, 1, SLOTS, seen), expected, atol=1e-6)


@pytest.mark.parametrize("filled", [0, 1, 255, 256, 257, 511, 512, 513])
def test_what_no_row_has_filled_is_not_read(filled):
    """Were it read, the product of a probability of 0 and nan would be nan."""
    cache, new = caches(None)
    slot, one = jnp.minimum(SLOTS, filled).at[1].set(filled), jax.tree.map(lambda x: x[1], new)
    size = next(size for size in read_sizes(C) if size >= filled)
    spoilt = jax.tree.map(lambda x: x.at[..., size:, :].set(jnp.nan), cache)
    q = draw(ROWS, 1, HEADS, H, seed=4)
    ours = jax.jit(attend_token)(q, spoilt, 1, slot, seen_slots(slot, C), one)
    assert_close(ours, written_first(q, cache, new, slot), atol=1e-6)


@pytest.mark.parametrize(
    ("slots", "sizes"),
    [
        (16, [16]),
        (256, [256]),
        (272, [256, 272]),
        (768, [256, 512, 768]),
        (1664, [512, 1024, 1536, 1664]),
        (4096, [1024, 2048, 3072, 4096]),
    ],
)
def test_few_sizes_are_compiled(slots, sizes):
    assert read_sizes(slots) == sizes


def test_a_gpu_reads_all(monkeypatch):
    monkeypatch.setattr(decode_attention, "platform", lambda: "gpu")
    assert read_sizes(4096) == [4096]


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@pytest.mark.parametrize("slots", [6, 32, 39])
def test_a_tpu_writes_in_tiles_what_others_scatter(slots, bits):
    cache, new = caches(bits, jnp.bfloat16)
    cache = jax.tree.map(lambda x: x[:, :, :, :slots], cache)
    slot = jnp.array([0, slots - 1, 4, slots])  # the last row is full: its token is left out
    ours, expected = (jax.jit(write)(cache, new, slot) for write in (write_in_tiles, scatter_token))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    for before, after, token in zip(*map(jax.tree.leaves, (cache, ours, new)), strict=True):
        assert np.array_equal(after[:, 1, :, slots - 1], token[:, 1, 0])
        assert np.array_equal(after[:, 3], before[:, 3])
