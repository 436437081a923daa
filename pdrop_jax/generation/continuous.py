"""Continuous batching: requests join and leave a running batch, whose rows are the slots of ``slots``.

A thread of the engine's own runs the device. In turn it admits waiting requests to free slots, first come, first
served, and decodes a few tokens of all that run. Whatever shares the batch, a request gets the answer that ``generate``
gives it alone.
"""

import atexit
import collections
import contextlib
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from pdrop_jax.batch import Bucket
from pdrop_jax.config import Implementation
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import check_implementation, on_devices
from pdrop_jax.generation.logprobs import TOP_LOGPROBS
from pdrop_jax.generation.lru import CacheCounts
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.requests import Handle, Request
from pdrop_jax.generation.reuse import ImageCache, PrefixCache, Reusable
from pdrop_jax.generation.running import RunningBatch
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.slots import slot_bytes, slot_shape
from pdrop_jax.generation.stopping import Constraint
from pdrop_jax.inputs.assemble import assemble
from pdrop_jax.inputs.buckets import bucket_among, choose_bucket, prompt_buckets
from pdrop_jax.inputs.messages import Prompt
from pdrop_jax.inputs.processor import Entry, as_list

SLOTS = 8  # unless the caller says how many, or how much memory they may take


class EngineFull(UserError):
    """As many requests wait as an engine's queue holds."""


class Engine:
    """Answers requests of many threads as one running batch.

    Example::

        with pdrop_jax.Engine(model, slots=16, max_new_tokens=128) as engine:
            engine.warm_up()
            handles = [engine.submit("What is this?", path) for path in paths]
            texts = [handle.result().text for handle in handles]

    Args:
      slots: number of requests that run at the same time; by default as many as ``memory`` holds, or 8.
      memory: bytes of device memory for the slots, on a mesh of all its devices together. Parameters and the
        activations of a prefill come on top. See ``slots.slot_bytes``.
      max_new_tokens: largest ``Sampling.max_new_tokens`` of a request; slots are made for it.
      max_prompt_tokens: makes buckets for prompts of up to so many tokens, an image and text beside it; see
        ``buckets.prompt_buckets``.
      buckets: the allowed buckets, in place of ``max_prompt_tokens``.
      max_waiting: number of requests that may wait for a slot.
      prefill_rows: up to so many waiting requests of one bucket are prefilled at once, a power of two. Smaller ones are
        compiled too.
      image_cache: bytes of device memory for the embeddings of pictures, so that a picture that was there before is
        not encoded again; 0 is none.
      prefix_cache: bytes of device memory for the first stage of prompts up to their last picture, so that another
        question about it runs only its own tokens through that stage; 0 is none. Answers are the same up to float
        rounding. Unused where nothing can be ranked again: a drop before the first layer, or a score of what is not
        cached (``TokenScore.of_stage_output``).
      implementation: attention implementation of the prefill, see ``model.attention``.
      extras: whether requests may have constraints and log-probabilities, for which another program is compiled. While
        one with a constraint runs, all requests decode token by token.
      turn: a context in which the engine uses the device. Engines that share a device take turns with one
        ``turns.Turns``.

    Raises:
      UserError: a number is out of range, ``memory`` holds no slot, or a cache not what a prefill needs at once.
    """

    def __init__(
        self,
        model: Model,
        slots: int | None = None,
        *,
        memory: int | None = None,
        max_new_tokens: int = 256,
        max_prompt_tokens: int = 1024,
        buckets: Sequence[Bucket] | None = None,
        max_waiting: int = 256,
        prefill_rows: int = 4,
        image_cache: int = 0,
        prefix_cache: int = 0,
        implementation: Implementation = "auto",
        extras: bool = False,
        turn: contextlib.AbstractContextManager | None = None,
    ) -> None:
        check_implementation(implementation)
        if slots is not None and memory is not None:
            raise UserError("slots and memory are two ways to say the same: pass one of them")
        for name, value in {
            "slots": slots,
            "memory": memory,
            "max_new_tokens": max_new_tokens,
            "max_prompt_tokens": max_prompt_tokens,
            "max_waiting": max_waiting,
            "prefill_rows": prefill_rows,
        }.items():
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        for name, value in {"image_cache": image_cache, "prefix_cache": prefix_cache}.items():
            if value < 0:
                raise UserError(f"{name} must be at least 0, got {value}")
        config, positions = model.config, model.config.text.max_length
        if max_new_tokens >= positions:
            raise UserError(f"max_new_tokens is {max_new_tokens}, but the model has {positions} positions")
        if buckets is None:
            buckets = prompt_buckets(config, min(max_prompt_tokens, positions - max_new_tokens))
        if not buckets:
            raise UserError("an engine needs at least one bucket, got none")
        self._model, self._max_new_tokens, self._max_waiting = model, max_new_tokens, max_waiting
        self.buckets = tuple(dict.fromkeys(buckets))
        self._extras, self._shared, self._turn = extras, turn is not None, turn or contextlib.nullcontext()
        most = min(TOP_LOGPROBS, config.text.vocab_size) if extras else 0
        with on_devices(model):
            shape = slot_shape(config, self.buckets, max_new_tokens, implementation, most)
        one = slot_bytes(config, shape, model.dtype)
        if memory is not None and memory < one:
            raise UserError(
                f"memory of {memory:,} bytes holds no slot, which takes {one:,}: allow more memory, smaller buckets or "
                "fewer new tokens"
            )
        slots = slots or (SLOTS if memory is None else memory // one)
        rows = 1 << (min(prefill_rows, slots).bit_length() - 1)  # a power of two, rounded down
        self.slots, self.memory = slots, slots * one
        images = prefixes = None
        shown = any(bucket.images for bucket in self.buckets)
        with self._turn:
            if image_cache and shown:
                images = ImageCache(model, self.buckets, image_cache, rows, implementation)
            if prefix_cache and shown and PrefixCache.applies(config):
                prefixes = PrefixCache(model, self.buckets, prefix_cache, rows, implementation)
            self._batch = RunningBatch(model, slots, shape, rows, implementation, images, prefixes)
        self._waiting: collections.deque[Request] = collections.deque()
        self._changed = threading.Condition()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = self._cancelling = False
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        counts = f"{self.running} running, {self.waiting} waiting"
        return f"Engine({self._model!r}, slots={self.slots}, {len(self.buckets)} buckets, {counts})"

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return len(self._batch.running)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def failed(self) -> bool:
        """Whether an error on the device has stopped the engine."""
        return self._error is not None

    @property
    def caches(self) -> dict[str, CacheCounts]:
        """Counters of the caches that there are, "images" and "prefixes"."""
        both = {"images": self._batch.images, "prefixes": self._batch.prefixes}
        return {name: cache.counts for name, cache in both.items() if cache}

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(cancel=error is not None)

    def warm_up(self) -> None:
        """Compiles all that requests can need, with a progress bar; afterwards nothing compiles.

        Raises:
          UserError: a request has been made before.
        """
        with self._starting:
            if self._thread or self._closing:
                raise UserError("warm_up comes before the first request")
            with self._turn:
                self._batch.compile(self.buckets)

    def submit(
        self,
        prompt: Prompt,
        images: Entry = None,
        sampling: Sampling = Sampling(),
        *,
        stream: Callable[[str], None] | None = None,
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
    ) -> Handle:
        """Queues a request. Images are read, and the prompt is tokenized, in the caller's thread.

        Args:
          prompt, images, sampling: as of one row of ``generate``. It is sampled as it would be in a batch of its own.
          stream: called with new text while the answer grows, in the engine's thread: all requests wait for it. An
            error in it fails the request.
          stop: the answer ends in front of the first of these strings.
          constraint: what the answer must look like; of this request alone.
          top_logprobs: report the log-probability of each token, and so many of the most likely ones in its place.

        Raises:
          EngineFull: ``max_waiting`` requests wait already.
          UserError: the prompt is malformed, an image cannot be read, the request does not fit the engine's buckets,
            ``max_new_tokens`` or the model's positions, or the engine is closed.
        """
        self._check_open()
        if sampling.max_new_tokens > self._max_new_tokens:
            raise UserError(
                f"max_new_tokens is {sampling.max_new_tokens}, but the engine's slots hold {self._max_new_tokens}: ask "
                "for fewer, or make the engine with more"
            )
        if not self._extras and (constraint is not None or top_logprobs is not None):
            raise UserError("constraints and log-probabilities need an engine that is made with extras=True")
        if top_logprobs is not None and not 0 <= top_logprobs <= TOP_LOGPROBS:
            raise UserError(f"top_logprobs must be in 0..{TOP_LOGPROBS}, got {top_logprobs}")
        processor, config = self._model.processor, self._model.config
        row = processor.row(prompt, as_list(images))
        choose_bucket([row], config, sampling.max_new_tokens)  # checks the model's positions
        if config.features_per_token == 1 and any(image.weight is not None for image in row.images):
            raise UserError("an engine of this model takes no videos: pass the frames as pictures, or use generate")
        bucket = bucket_among(self.buckets, row)
        reusable = Reusable.of(row, config, bucket) if self._batch.images or self._batch.prefixes else Reusable()
        request = Request.of(
            assemble([row], config, bucket),
            sampling,
            processor,
            reusable,
            stream,
            self._wake,
            stop,
            constraint,
            top_logprobs,
        )
        with self._starting, self._changed:
            self._check_open()
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pdrop-jax engine", daemon=True)
                self._thread.start()
                atexit.register(self.close, cancel=True)  # a thread that still runs the device at exit could crash
            self._changed.notify_all()
        return request.handle

    def close(self, cancel: bool = False) -> None:
        """Ends the engine and its thread, after all requests are answered. No other can be made.

        Args:
          cancel: cancels all requests instead of answering them.
        """
        with self._changed:
            self._closing, self._cancelling = True, self._cancelling or cancel
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            if self._thread:
                self._thread.join()
            self._batch.release()
        atexit.unregister(self.close)

    def _check_open(self) -> None:
        with self._changed:
            if self._error:
                raise RuntimeError(f"the engine has stopped: {self._error}") from self._error
            if self._closing:
                raise UserError("the engine is closed: make another one")
            if len(self._waiting) >= self._max_waiting:
                raise EngineFull(f"{self._max_waiting} requests wait already, as many as max_waiting: try again later")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            with on_devices(self._model):
                while self._work_comes():
                    with self._turn:
                        self._admit()
                        if self._batch.running:
                            self._batch.step()
                    if self._shared or not self._batch.running:
                        self._batch.pass_on()
        except BaseException as error:
            self._batch.pass_on()
            with self._changed:
                self._error = error
                lost = [*self._batch.running.values(), *self._waiting]
                self._waiting.clear()
            for request in lost:
                request.handle.finish(error)

    def _work_comes(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._batch.running or self._closing)
            if self._cancelling:
                for request in (*self._waiting, *self._batch.running.values()):
                    request.handle.cancelled = True
            return bool(self._waiting or self._batch.running)

    def _admit(self) -> None:
        """The requests that have waited longest go to the free slots: none is passed over because of its bucket."""
        with self._changed:
            cancelled = [request for request in self._waiting if request.handle.cancelled]
            self._waiting = collections.deque(request for request in self._waiting if not request.handle.cancelled)
            new = [self._waiting.popleft() for _ in range(min(self._batch.free, len(self._waiting)))]
        for request in cancelled:
            request.handle.finish(request.completion("cancelled"))
        if new:
            self._batch.admit(new)
