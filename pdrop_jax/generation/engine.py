"""Generation: a jitted prefill, a jitted decode loop, and the host code around them.

The two jitted functions are ``start`` (prompts -> state with the first new token) and ``decode`` (a
``lax.while_loop`` that donates its state). Each compiles once for a bucket, a batch size and a capacity. Rows of a
state count their own steps: ``slots`` puts prompts that arrive later into the rows of answers that are complete.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pdrop_jax.batch import Batch
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.logprobs import Logprobs, no_logprobs, record
from pdrop_jax.generation.next_token import TokenSampler, only, sample, token_sampler
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.result import Generation, kept_tokens, token_scores
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.timer import Timer
from pdrop_jax.inputs.buckets import power_of_two
from pdrop_jax.inputs.messages import Prompt
from pdrop_jax.model.cache import AXES, StageCache, cache_bytes
from pdrop_jax.model.decoder import DecodeState
from pdrop_jax.model.drop import DropRecord
from pdrop_jax.model.params import Params
from pdrop_jax.model.vlm import decode_step, prefill
from pdrop_jax.sharding import batch_sharding, constrain

CAPACITY_STEP = 64  # capacities are multiples of it, so that few are compiled
STREAM_EVERY = 4  # new tokens between two calls of ``stream``
# By default XLA omits roundings to bfloat16 inside fusions, and what it fuses depends on the batch size: a row could
# keep other tokens in a batch than alone (benchmarks/batches.py).
ROUNDED = {"xla_allow_excess_precision": False}

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """The carry of the decode loop. B rows, C = capacity.

    Attributes:
      tokens: (B, C) int32, new tokens; 0 after a row's stop token.
      step: (B,) int32, number of new tokens, a stop token included.
      done: (B,) bool, rows that have sampled a stop token.
      key: PRNG key of the whole call, or (B,), one for each row.
      model: caches and lengths.
      logprobs: of the new tokens that were sampled with ``allowed``; None if nobody asks for them.
    """

    tokens: jax.Array
    step: jax.Array
    done: jax.Array
    key: jax.Array
    model: DecodeState
    logprobs: Logprobs | None = None


@jax.named_scope("head")
def _append(
    state: State,
    logits: jax.Array,
    sampler: TokenSampler,
    stop_ids: jax.Array,
    active: jax.Array | bool,
    allowed: jax.Array | None = None,
) -> State:
    """``state`` with one more token of each row that is ``active`` (B,); the others stay as they are."""
    fold = jax.random.fold_in
    key = jax.vmap(fold)(state.key, state.step) if state.key.ndim else fold(state.key, state.step.max())
    token = sample(logits if allowed is None else only(logits, allowed), key, sampler)
    here = (jnp.arange(state.tokens.shape[1]) == state.step[:, None]) & jnp.reshape(active, (-1, 1))
    if allowed is not None and state.logprobs is not None:
        state = dataclasses.replace(state, logprobs=record(state.logprobs, logits, token, here))
    stopped = (token[:, None] == stop_ids).any(1) & active
    return dataclasses.replace(
        state,
        tokens=jnp.where(here, token[:, None], state.tokens),
        step=state.step + jnp.asarray(active, jnp.int32),
        done=state.done | stopped,
    )


def placed(tree: Tree) -> Tree:
    """A tree of arrays sharded over the mesh, if there is one: caches by rows and heads, everything else replicated.

    A program that returns its argument where it found it is not compiled again for it.
    """

    def place(x: Any) -> Any:
        if isinstance(x, StageCache):
            return jax.tree.map(lambda y: constrain(y, *(None, *AXES)[: y.ndim]), x)
        return constrain(x, *(None,) * x.ndim)

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, StageCache))


@functools.partial(jax.jit, static_argnames=("config", "capacity", "implementation"), compiler_options=ROUNDED)
def start(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    key: jax.Array,
    sampler: TokenSampler,
    stop_ids: jax.Array,
    *,
    capacity: int,
    implementation: Implementation = "auto",
) -> tuple[State, jax.Array, tuple[DropRecord, ...]]:
    """Prefill and the first new token of each row.

    Args:
      stop_ids: (n,) int32.
      capacity: cache slots for new tokens.

    Returns:
      (state, logits (B, V) float32 that the token is sampled from, drop records).
    """
    logits, model, drops = prefill(config, params, batch, capacity, implementation=implementation)
    return first_token(logits, model, capacity, key, sampler, stop_ids), logits, drops


def first_token(
    logits: jax.Array,
    model: DecodeState,
    capacity: int,
    key: jax.Array,
    sampler: TokenSampler,
    stop_ids: jax.Array,
    allowed: jax.Array | None = None,
    top_logprobs: int = 0,
) -> State:
    """The state with one new token of each row, sampled from ``logits`` (B, V)."""
    B = logits.shape[0]
    zero, logprobs = jnp.zeros(B, jnp.int32), no_logprobs(B, capacity, top_logprobs)
    state = State(jnp.zeros((B, capacity), jnp.int32), zero, jnp.zeros(B, bool), key, model, logprobs)
    return placed(_append(state, logits, sampler, stop_ids, True, allowed))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",), compiler_options=ROUNDED)
def decode(
    config: LlavaConfig,
    params: Params,
    state: State,
    until: jax.Array,
    sampler: TokenSampler,
    stop_ids: jax.Array,
    allowed: jax.Array | None = None,
) -> State:
    """Decodes until every row is done or has ``until`` () or (B,) int32 new tokens. Consumes ``state``.

    A row that is done, or has its tokens, waits for the others: it repeats its last token in the same slots. A row of
    which no token is wanted (``until`` 0) is free and forgets its cache, or the others would read as far as it reached.

    Args:
      allowed: see ``next_token.only``; the same for all steps of the call. With it the state's ``logprobs`` are filled.
    """

    free = until <= 0
    lengths = tuple(jnp.where(free, 0, length) for length in state.model.lengths)
    model = dataclasses.replace(state.model, lengths=lengths)
    state = dataclasses.replace(state, step=jnp.where(free, 1, state.step), model=model)

    def active(state: State) -> jax.Array:
        return ~state.done & (state.step < until)

    def one(state: State) -> State:
        last = jnp.take_along_axis(state.tokens, state.step[:, None] - 1, axis=1)[:, 0]
        logits, model = decode_step(config, params, last, state.model, state.step - 1)
        return _append(dataclasses.replace(state, model=model), logits, sampler, stop_ids, active(state), allowed)

    return placed(jax.lax.while_loop(lambda state: active(state).any(), one, state))


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    images: Sequence[Any] | None = None,
    sampling: Sampling = Sampling(),
    *,
    implementation: Implementation = "auto",
    stream: Callable[[int, str], None] | None = None,
) -> Generation:
    """Answers ``prompts`` about ``images``.

    Example::

        generate(model, ["What is this?"], ["cat.jpg"], Sampling(max_new_tokens=128, temperature=0.7, seed=1))

    Batches are padded to 1, 2, 4, 8, … rows, so that few sizes are compiled.

    Args:
      prompts: B questions or conversations, such as lists of messages with images inside; see
        ``inputs.messages.read_conversation``.
      images: for each row None, a picture or several (path, PIL image or uint8 array), or a ``Video``.
      sampling: answer length and sampling; the default is greedy decoding of up to 64 tokens.
      implementation: attention implementation, see ``model.attention``.
      stream: called with (row, new text) while the answers grow.

    Raises:
      UserError: a picture cannot be read, image tags and pictures do not match, or a prompt is malformed or too long.
    """
    check_implementation(implementation)
    batch = model.processor(prompts, images, max_new_tokens=sampling.max_new_tokens)
    padded, rows = with_rows(batch, power_of_two(len(prompts))), len(prompts)
    return generate_batch(model, padded, sampling, rows=rows, implementation=implementation, stream=stream)


def check_implementation(implementation: Implementation) -> None:
    """Raises UserError for an attention implementation that this machine cannot run."""
    if implementation == "splash" and jax.default_backend() != "tpu":
        raise UserError(f"splash attention needs a TPU, but this is a {jax.default_backend()}: use 'auto'")


def generate_batch(
    model: Model,
    batch: Batch,
    sampling: Sampling = Sampling(),
    *,
    rows: int | None = None,
    implementation: Implementation = "auto",
    stream: Callable[[int, str], None] | None = None,
) -> Generation:
    """Same as ``generate``, for a batch that ``model.processor`` has prepared.

    Args:
      rows: only the first ``rows`` are answered, the others are padding; None is all of them.
    """
    config, processor = model.config, model.processor
    timer = Timer()
    with on_devices(model):
        state, logits, drops = timer.call(
            start,
            config,
            model.params,
            rows_on_devices(model, batch),
            jax.random.key(sampling.seed),
            token_sampler(sampling),
            stop_ids_of(model),
            capacity=capacity_for(sampling.max_new_tokens),
            implementation=implementation,
        )
        prefill_seconds = timer.lap()
        size = cache_bytes(state.model.caches)
        lengths = np.stack(jax.device_get(state.model.lengths), axis=1)  # (B, stages)
        state, token_ids = finish(model, state, sampling, timer, stream, rows)
    drops = jax.device_get(drops)
    if rows is not None and rows < len(lengths):
        batch, drops, lengths, logits = jax.tree.map(lambda x: x[:rows], (batch, drops, lengths, logits))
    return Generation(
        texts=[processor.decode(ids) for ids in token_ids],
        token_ids=token_ids,
        stage_lengths=lengths.tolist(),
        image_tokens=[np.bincount(row)[1:].tolist() for row in np.asarray(batch.image_id)],
        kept=kept_tokens(batch, drops),
        scores=token_scores(batch, drops),
        first_logits=logits,
        compile_seconds=timer.compile_seconds,
        prefill_seconds=prefill_seconds,
        decode_seconds=timer.lap(),
        cache_bytes=size,
    )


def capacity_for(max_new_tokens: int) -> int:
    """Cache slots for new tokens: ``max_new_tokens`` rounded up to a multiple of CAPACITY_STEP."""
    return -(-max_new_tokens // CAPACITY_STEP) * CAPACITY_STEP


def stop_ids_of(model: Model) -> np.ndarray:
    """(n,) int32, tokens that end an answer."""
    return np.array(model.processor.stop_ids, np.int32)


def on_devices(model: Model) -> contextlib.AbstractContextManager:
    """The context for jitted calls: the model's mesh, if it has one."""
    return contextlib.nullcontext() if model.mesh is None else jax.set_mesh(model.mesh)


def committed(model: Model, tree: Tree) -> Tree:
    """Arrays that were made without inputs, where programs return them: their first call is not compiled twice."""
    if model.mesh is not None:
        return tree
    (device,) = jax.tree.leaves(model.params)[0].devices()
    return jax.device_put(tree, device)


def rows_on_devices(model: Model, batch: Batch) -> Batch:
    """The batch with its rows sharded over the model's mesh, if it has one."""
    if model.mesh is None:
        return batch
    rows = batch_sharding(model.mesh, len(batch.length))
    return jax.tree.map(lambda x: jax.device_put(x, rows), batch)


def with_rows(batch: Batch, rows: int) -> Batch:
    """``batch`` padded to ``rows`` rows with copies of its first one."""
    padding = rows - len(batch.length)
    return jax.tree.map(lambda x: np.concatenate([x, *[x[:1]] * padding]), batch) if padding else batch


def finish(
    model: Model,
    state: State,
    sampling: Sampling,
    timer: Timer,
    stream: Callable[[int, str], None] | None,
    rows: int | None = None,
) -> tuple[State, list[list[int]]]:
    """Decodes until every row is done or has ``sampling.max_new_tokens`` tokens; consumes ``state``.

    Args:
      rows: the rows behind the first ``rows`` are padding and are not decoded; None is no padding.

    Returns:
      (state, new tokens of each row without the stop token).
    """
    sampler, stop_ids, most = token_sampler(sampling), stop_ids_of(model), sampling.max_new_tokens
    rows, all_rows = rows or len(state.done), len(state.done)
    streams = [model.processor.stream() for _ in range(rows)] if stream else []
    sent = 0
    while True:
        steps, done, tokens = (x[:rows] for x in jax.device_get((state.step, state.done, state.tokens)))
        step = int(steps.max())
        over = bool(done.all()) or step >= most
        for row, text in enumerate(streams):
            new = until_stop(tokens[row, :step], stop_ids)[sent:]
            piece = "".join(map(text.put, new)) + (text.end() if over else "")
            if piece and stream:
                stream(row, piece)
        sent = step
        if over:
            return state, [until_stop(row[:sent], stop_ids) for row in tokens]
        until = np.zeros(all_rows, np.int32)
        until[:rows] = min(step + STREAM_EVERY, most) if stream else most
        state = timer.call(decode, model.config, model.params, state, until, sampler, stop_ids)


def until_stop(ids: np.ndarray, stop_ids: np.ndarray) -> list[int]:
    """``ids`` (n,) up to its first stop token."""
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    return ids[: stops[0] if len(stops) else None].tolist()
