"""Checksums of arrays: the same for every way to compute them, another one for every change."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrop_jax.checkpoint import checksums as module
from pdrop_jax.checkpoint.checksums import checksums, verify
from pdrop_jax.errors import UserError


def by_hand(x):
    words = np.frombuffer(np.ascontiguousarray(x).tobytes(), f"uint{8 * x.dtype.itemsize}").astype(object)
    return int(sum(word * (2 * place + 1) for place, word in enumerate(words.tolist())) % 2**32)


def array_of(shape, dtype, seed=0):
    return (100 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4, 5), (2, 33)])
def test_every_way_gives_the_sum_by_hand(shape, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNKS", (16, 4))
    x = np.asarray(array_of(shape, dtype))
    found = checksums({"numpy": x, "jax": jnp.asarray(x)}) | jax.device_get(module._on_devices({"devices": x}))
    assert found == dict.fromkeys(("numpy", "jax", "devices"), by_hand(x))


def test_an_array_of_several_chunks():
    x = array_of(module.CHUNKS[0] + 2 * module.CHUNKS[1] + 5, np.uint8)
    assert checksums({"x": x})["x"] == by_hand(x)


@given(st.integers(0, 59), st.integers(0, 15))
def test_any_flipped_bit_changes_it(place, bit):
    x = array_of((3, 4, 5), ml_dtypes.bfloat16)
    damaged = x.copy()
    damaged.reshape(-1).view(np.uint16)[place] ^= 1 << bit
    with pytest.raises(UserError, match="there is damaged: the checksum of x does not match"):
        verify({"x": damaged}, checksums({"x": x}), "there")
    verify({"x": x}, checksums({"x": x}), "there")


def test_words_that_change_places_change_it():
    x = array_of((8,), np.float32)
    assert checksums({"x": x}) != checksums({"x": np.roll(x, 1)})


def test_an_array_can_still_be_donated():
    x = jnp.ones(1000)
    place = x.unsafe_buffer_pointer()
    checksums({"x": x})
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(x).unsafe_buffer_pointer() == place
