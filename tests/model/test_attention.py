"""The one attention call: its reference, the TPU kernel beside it, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_close

from pdrop_jax.model import attention as module
from pdrop_jax.model.attention import BLOCK, TILE, aligned, attend_cache, attention, segment_attention
from pdrop_jax.model.splash import splash_causal, splash_two_way

HEADS = pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])


def qkv(N, K, T=6, S=6, H=8, dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((2, n, heads, H)), dtype) for n, heads in ((T, N), (S, K), (S, K)))


def plain_attention(q, k, v, causal, length, window=None):
    """In double precision; query head n reads key-value head n // G."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(q.shape[-1])
    seen = np.arange(k.shape[1]) < np.reshape(length, (-1, 1, 1, 1))
    if causal:
        seen = seen & np.tri(q.shape[1], k.shape[1], dtype=bool)
    if window is not None:
        seen = seen & ~np.tri(q.shape[1], k.shape[1], -window, dtype=bool)
    weights = np.where(seen, np.exp(logits), 0)
    total = np.maximum(weights.sum(-1, keepdims=True), 1e-99)  # a padding query may see nothing
    return np.einsum("BNTS,BSNH->BTNH", weights / total, v)


@HEADS
@pytest.mark.parametrize("causal", [True, False])
def test_xla_is_attention_over_the_valid_keys(N, K, causal):
    q, k, v = qkv(N, K)
    length = np.array([6, 3], np.int32)
    ours = attention(q, k, v, causal=causal, length=length, implementation="xla")
    expected = plain_attention(q, k, v, causal, length)
    assert_close(ours[0], expected[0], atol=1e-6)
    assert_close(ours[1, :3], expected[1, :3], atol=1e-6)
    assert np.isfinite(ours).all()


@HEADS
def test_a_single_query_sees_every_valid_key(N, K):
    q, k, v = qkv(N, K, T=1)
    length = np.array([4, 6], np.int32)
    ours = attention(q, k, v, causal=False, length=length, implementation="xla")
    assert_close(ours, plain_attention(q, k, v, False, length), atol=1e-6)


def test_without_lengths_every_key_is_valid():
    q, k, v = qkv(4, 4)
    ours = attention(q, k, v, causal=False, implementation="xla")
    assert_close(ours, plain_attention(q, k, v, False, [6, 6]), atol=1e-6)


def test_the_softmax_of_bfloat16_is_float32():
    q, k, v = qkv(2, 2, T=512, S=512, dtype=jnp.bfloat16)  # 512 weights summed in bfloat16 would be far off
    ours = attention(q, k, v, causal=False, implementation="xla")
    assert ours.dtype == jnp.bfloat16
    assert_close(ours.astype(jnp.float32), plain_attention(q, k, v, False, [512, 512]), atol=2**-8)


@pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("causal", [True, False])
def test_what_auto_takes_on_this_platform_agrees_with_xla(N, K, causal):
    q, k, v = qkv(N, K, T=300, S=300)  # no multiple of any block size
    length = np.array([300, 130], np.int32)
    ours, expected = (attention(q, k, v, causal=causal, length=length, implementation=i) for i in ("auto", "xla"))
    assert_close(ours[0], expected[0], atol=1e-6)
    assert_close(ours[1, :130], expected[1, :130], atol=1e-6)
    assert np.isfinite(ours).all()


@HEADS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [5, BLOCK, 2 * BLOCK + 9])
def test_blocked_agrees_with_xla(N, K, causal, T):
    q, k, v = qkv(N, K, T=T, S=T)
    length = jnp.array([T, T // 2])
    ours = attention(q, k, v, causal=causal, length=length, implementation="blocked")
    expected = attention(q, k, v, causal=causal, length=length, implementation="xla")
    assert_close(ours[0], expected[0], atol=2e-6)
    assert_close(ours[1, : T // 2], expected[1, : T // 2], atol=2e-6)
    assert np.isfinite(ours).all()


def test_blocked_takes_the_softmax_of_a_bfloat16_model_in_float32():
    q, k, v = qkv(4, 2, T=BLOCK + 9, S=BLOCK + 9, dtype=jnp.bfloat16)
    ours = attention(q, k, v, causal=True, implementation="blocked")
    assert ours.dtype == jnp.bfloat16
    exact = plain_attention(q, k, v, True, [BLOCK + 9] * 2)
    assert_close(ours.astype(jnp.float32), exact, atol=2e-2)


@HEADS
def test_a_token_attends_to_a_cache_as_to_keys_in_a_row(N, K):
    q, k, v = qkv(N, K, T=1)
    length = jnp.array([4, 6])
    ours = attend_cache(q, k.swapaxes(1, 2), v.swapaxes(1, 2), length - 1)
    assert_close(ours, attention(q, k, v, causal=False, length=length, implementation="xla"), atol=1e-6)


@HEADS
def test_each_new_token_sees_the_cache_up_to_itself(N, K):
    """In each row another number of tokens before, in more than one block, and slots behind that nothing is to see."""
    S, T = BLOCK + 40, BLOCK + 9
    q, k, v = qkv(N, K, T=S, S=S)
    first = np.array([3, S - T - 5])
    new = jnp.stack([q[b, n : n + T] for b, n in enumerate(first)])
    ours = attend_cache(new, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(first))
    expected = plain_attention(q, k, v, True, [S, S])
    for b, n in enumerate(first):
        assert_close(ours[b], expected[b, n : n + T], atol=1e-5)


@pytest.mark.parametrize("S", [384, 304, 1072])  # 304: padded keys; 1072: padded queries too, in several blocks
@HEADS
def test_the_tpu_kernel_agrees_with_xla(N, K, S):
    q, k, v = qkv(N, K, T=S, S=S, H=128)
    length = jnp.array([S, 100])
    ours = splash_causal(q, k, v, interpret=True)
    expected = attention(q, k, v, causal=True, length=length, implementation="xla")
    assert_close(ours[0], expected[0], atol=1e-5)
    assert_close(ours[1, :100], expected[1, :100], atol=1e-5)
    assert np.isfinite(ours).all()


@HEADS
def test_the_gradient_of_the_tpu_kernel_agrees_with_xla(N, K):
    """The padding of the rows and of the kernel must not reach a valid token."""
    inputs = qkv(N, K, T=304, S=304, H=128)
    length = jnp.array([304, 100])
    valid = np.arange(304) < np.asarray(length)[:, None]

    def gradient(of):
        return jax.jit(jax.grad(lambda inputs: (jnp.sin(of(*inputs)) * valid[..., None, None]).sum()))(inputs)

    ours = gradient(functools.partial(splash_causal, interpret=True))
    expected = gradient(functools.partial(attention, causal=True, length=length, implementation="xla"))
    for x, y in zip(ours, expected, strict=True):
        largest = np.abs(y).max()
        assert_close(x[valid] / largest, y[valid] / largest, atol=2e-6)
        assert np.isfinite(x).all()


@HEADS
@pytest.mark.parametrize("window", [1, 3, 6, 99])
def test_a_window_hides_the_keys_before_it(N, K, window):
    q, k, v = qkv(N, K)
    length = np.array([6, 3], np.int32)
    ours = attention(q, k, v, causal=True, length=length, window=window, implementation="xla")
    expected = plain_attention(q, k, v, True, length, window)
    assert_close(ours[0], expected[0], atol=1e-6)
    assert_close(ours[1, :3], expected[1, :3], atol=1e-6)
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("window", [1, 3, BLOCK, BLOCK + 5])
@pytest.mark.parametrize("T", [5, 3 * BLOCK + 9])
def test_blocked_agrees_with_xla_on_a_window(window, T):
    q, k, v = qkv(4, 2, T=T, S=T)
    length = jnp.array([T, T // 2])
    ours = attention(q, k, v, causal=True, length=length, window=window, implementation="blocked")
    expected = attention(q, k, v, causal=True, length=length, window=window, implementation="xla")
    assert_close(ours[0], expected[0], atol=2e-6)
    assert_close(ours[1, : T // 2], expected[1, : T // 2], atol=2e-6)
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("window", [1, 3, 6, 99])
def test_a_token_sees_the_end_of_a_cache_through_a_window(window):
    q, k, v = qkv(4, 2, T=6)
    length = jnp.array([4, 6])
    last = q[jnp.arange(2), length - 1][:, None]
    ours = attend_cache(last, k.swapaxes(1, 2), v.swapaxes(1, 2), length - 1, window)
    expected = attention(q, k, v, causal=True, length=length, window=window, implementation="xla")
    assert_close(ours[:, 0], expected[jnp.arange(2), length - 1], atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 6, 99])
def test_a_chunk_sees_a_cache_through_a_window(window):
    q, k, v = qkv(4, 2, T=6)
    ours = attend_cache(q[:, 2:5], k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.array([2, 2]), window)
    expected = attention(q, k, v, causal=True, length=jnp.array([6, 6]), window=window, implementation="xla")
    assert_close(ours, expected[:, 2:5], atol=1e-6)


@pytest.mark.parametrize("window", [3, 150])
def test_the_tpu_kernel_agrees_with_xla_on_a_window(window):
    q, k, v = qkv(4, 2, T=208, S=208, H=128)
    length = jnp.array([208, 100])
    ours = splash_causal(q, k, v, window=window, interpret=True)
    expected = attention(q, k, v, causal=True, length=length, window=window, implementation="xla")
    assert_close(ours[0], expected[0], atol=1e-5)
    assert_close(ours[1, :100], expected[1, :100], atol=1e-5)
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("T", [256, 300])
def test_the_tpu_kernel_of_segments_agrees_with_xla(T):
    """Pictures of other sizes in each row, and padding behind them."""
    q, k, v = qkv(2, 2, T=T, S=T, H=80)
    segment = jnp.array([np.repeat([1, 2, 0], [100, 30, T - 130]), np.repeat([1, 0], [7, T - 7])], jnp.int32)

    def out_and_gradients(of):
        def loss(inputs):
            out = of(*inputs, segment)
            return jnp.sin(out).sum(), out

        gradients, out = jax.jit(jax.grad(loss, has_aux=True))((q, k, v))
        return out, *gradients

    ours = out_and_gradients(functools.partial(splash_two_way, interpret=True))
    expected = out_and_gradients(functools.partial(segment_attention, implementation="xla"))
    for x, y in zip(ours, expected, strict=True):
        largest = np.abs(y).max()
        assert_close(x / largest, y / largest, atol=2e-6)


@pytest.mark.parametrize("T", [256, 300])
def test_the_tpu_kernel_of_a_tower_agrees_with_xla(T):
    """As many tokens as the kernel takes, and some that it needs padding for."""
    q, k, v = qkv(2, 2, T=T, S=T, H=72)
    ours = jax.jit(functools.partial(splash_two_way, interpret=True))(q, k, v)
    assert_close(ours, attention(q, k, v, causal=False, implementation="xla"), atol=2e-6)


def test_a_window_over_full_attention_is_refused():
    with pytest.raises(ValueError, match="sliding window is for causal"):
        attention(*qkv(2, 2), causal=False, window=3)


def test_causal_attention_of_a_chunk_is_refused():
    with pytest.raises(ValueError, match="as many queries as keys, got 1 and 6"):
        attention(*qkv(4, 4, T=1), causal=True)


def test_forced_splash_refuses_padding_that_two_way_attention_would_see():
    with pytest.raises(ValueError, match="hides no padding from two-way attention"):
        attention(*qkv(2, 2), causal=False, length=jnp.array([3, 6]), implementation="splash")


def test_forced_splash_refuses_a_cpu():
    with pytest.raises(ValueError, match="CPU"):
        attention(*qkv(2, 2, T=128, S=128), causal=True, implementation="splash")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forced_cudnn_refuses_float32_and_a_cpu(dtype):
    with pytest.raises(ValueError, match=r"(?i)cudnn"):
        attention(*qkv(2, 2, dtype=dtype), causal=True, implementation="cudnn")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is chosen on a GPU, with the reference in place of cuDNN. Gives the shapes of queries it was called with."""
    called, plain = [], jax.nn.dot_product_attention

    def instead(q, *operands, implementation, **options):
        assert implementation == "cudnn"
        called.append(q.shape)
        return plain(q, *operands, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    return called


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [None, (5, 7)])
def test_on_a_gpu_gradients_have_even_lengths(causal, length, as_on_a_gpu):
    q, k, v = qkv(4, 2, T=7, S=7, dtype=jnp.bfloat16)
    length = None if length is None else jnp.array(length)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape) / 20, jnp.bfloat16)
    weights *= 1 if length is None else (jnp.arange(7) < length[:, None])[..., None, None]

    def loss(*operands, implementation="auto"):
        out = attention(*operands, causal=causal, length=length, implementation=implementation)
        return (out * weights).astype(jnp.float32).sum()

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    assert as_on_a_gpu.pop() == (2, 8, 4, 8)
    assert loss(q, k, v) == value
    assert as_on_a_gpu.pop() == q.shape
    expected = jax.grad(functools.partial(loss, implementation="blocked"), (0, 1, 2))(q, k, v)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_close(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=2e-3)  # bfloat16: 8 bits of 0.3
        assert jnp.abs(theirs).max() > 0.05


def test_on_a_gpu_whole_pictures_are_seen_through_a_mask(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_BLOCK", 4)
    q, k, v = qkv(2, 2, T=9, S=9, dtype=jnp.bfloat16)
    segment = jnp.array([[1, 1, 1, 2, 2, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 2, 2]])
    expected = segment_attention(q, k, v, segment, "xla")
    assert as_on_a_gpu == []
    ours = segment_attention(q, k, v, segment)
    assert as_on_a_gpu == [q.shape]
    assert_close(ours.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2)  # bfloat16: 8 bits of 2
    jax.grad(lambda q: segment_attention(q, k, v, segment).astype(jnp.float32).sum())(q)
    assert as_on_a_gpu == [q.shape]


@pytest.mark.parametrize(("implementation", "multiple"), [("splash", TILE), ("auto", 1), ("xla", 1)])
def test_buffers_are_aligned_only_for_the_tpu_kernel(implementation, multiple):
    assert jax.default_backend() == "cpu"
    assert aligned(implementation) == multiple
