"""Requests to an ``Engine``: what the caller holds of one, and what the engine knows of it."""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from pdrop_jax.batch import Batch
from pdrop_jax.generation.logprobs import TokenLogprobs
from pdrop_jax.generation.reuse import Reusable
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.stopping import Constraint, StopStream
from pdrop_jax.inputs.processor import Processor

FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """The answer to one request of an engine, with measurements.

    Attributes:
      text: the answer, without the stop token.
      token_ids: tokens of the answer, without the stop token.
      finish_reason: "stop" after a stop token or at a stop string, "length" at ``Sampling.max_new_tokens``, "cancelled"
        where the caller or a closing engine ended it; then the answer is as far as it had come.
      stage_lengths: [stage], number of valid prompt tokens that the stage saw; empty if the request never ran.
      kept: [stage boundary][image], indices of the kept image tokens, counted within the image.
      scores: [stage boundary][image], float32 score of each of the image's tokens; NaN for tokens dropped earlier.
      cached: prompt tokens, a picture among them, whose first stage an earlier request had left in the prefix cache.
      logprobs: of each token, if the request asked for them.
      queue_seconds: from the request to its prefill, or to its end if it never ran.
      first_token_seconds: from the request to its first token; None if there was none.
      seconds: from the request to its end.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stage_lengths: list[int]
    kept: list[list[list[int]]]
    scores: list[list[np.ndarray]]
    cached: int
    logprobs: list[TokenLogprobs] | None
    queue_seconds: float
    first_token_seconds: float | None
    seconds: float


class Handle:
    """An answer that an engine is working on. Iterating over it yields the text piece by piece as it grows.

    Any thread may use it, also several at once; each iteration begins at the start of the answer.

    Attributes:
      logprobs: of the tokens so far, if the request asked for them.
    """

    def __init__(self, stream: Callable[[str], None] | None, wake: Callable[[], None]) -> None:
        self._stream = stream
        self._wake = wake
        self._pieces: list[str] = []
        self._changed = threading.Condition()
        self._future: concurrent.futures.Future[Completion] = concurrent.futures.Future()
        self.cancelled = False
        self.logprobs: list[TokenLogprobs] = []

    def result(self, timeout: float | None = None) -> Completion:
        """The complete answer.

        Args:
          timeout: seconds to wait; None is without a limit.

        Raises:
          TimeoutError: the answer was not complete in time. It goes on.
          Exception: what ended the request: an error in its ``stream``, or one of the engine.
        """
        return self._future.result(timeout)

    def __iter__(self) -> Iterator[str]:
        at = 0
        while True:
            with self._changed:
                while len(self._pieces) == at and not self.done:
                    self._changed.wait()
                new = self._pieces[at:]
            yield from new
            at += len(new)
            if not new:
                self.result()  # raises the request's error
                return

    @property
    def text(self) -> str:
        """The answer so far."""
        with self._changed:
            return "".join(self._pieces)

    @property
    def done(self) -> bool:
        """Whether the answer is complete, cancelled or failed."""
        return self._future.done()

    def add_done_callback(self, call: Callable[["Handle"], None]) -> None:
        """Calls ``call`` with this handle at the end of the request, or at once, in the engine's thread or this one."""
        self._future.add_done_callback(lambda _: call(self))

    def cancel(self) -> None:
        """Ends the answer within a few tokens, or takes the request out of the queue."""
        self.cancelled = True
        self._wake()

    def put(self, piece: str) -> None:
        """Called by the engine."""
        with self._changed:
            self._pieces.append(piece)
            self._changed.notify_all()
        if self._stream:
            self._stream(piece)

    def finish(self, end: Completion | BaseException) -> None:
        """Called by the engine, once."""
        if isinstance(end, BaseException):
            self._future.set_exception(end)
        else:
            self._future.set_result(end)
        with self._changed:
            self._changed.notify_all()


@dataclasses.dataclass(eq=False)
class Request:
    """What the engine knows of a request.

    Attributes:
      batch: the prompt as a batch of one row, in its bucket.
      reusable: what of it the engine's caches may hold.
      top_logprobs: the number of most likely tokens to report at each token; None reports no log-probabilities.
      allowed: what ``constraint`` allows next.
      ids: tokens of the answer that were passed on.
      step: tokens of the answer that are on the device, a stop token included.
      submitted, admitted, first: ``time.perf_counter`` at the request, its prefill and its first token.
    """

    handle: Handle
    sampling: Sampling
    batch: Batch
    reusable: Reusable
    text: StopStream
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    allowed: np.ndarray | None = None
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    admitted: float | None = None
    first: float | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    stage_lengths: list[int] = dataclasses.field(default_factory=list)
    kept: list[list[list[int]]] = dataclasses.field(default_factory=list)
    scores: list[list[np.ndarray]] = dataclasses.field(default_factory=list)
    cached: int = 0
    step: int = 0

    @classmethod
    def of(
        cls,
        batch: Batch,
        sampling: Sampling,
        processor: Processor,
        reusable: Reusable,
        stream: Callable[[str], None] | None = None,
        wake: Callable[[], None] = lambda: None,
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
    ) -> "Request":
        text = StopStream(processor.stream(), stop)
        allowed = constraint.allowed() if constraint else None
        return cls(Handle(stream, wake), sampling, batch, reusable, text, constraint, top_logprobs, allowed)

    @property
    def plain(self) -> bool:
        """Whether the request has neither a constraint nor log-probabilities."""
        return self.constraint is None and self.top_logprobs is None

    def take(self, ids: list[int], stopped: bool, logprobs: Sequence[TokenLogprobs] = ()) -> bool:
        """Passes on what is new in ``ids``; True at the end. What comes after the end is ignored.

        Args:
          ids: the tokens so far, without the stop token.
          stopped: whether the stop token came.
          logprobs: of the new ones.
        """
        if self.handle.done:
            return True
        if self.first is None:
            self.first = time.perf_counter()
        piece, known = "", len(self.ids)
        for token in ids[known:]:
            self.ids.append(token)
            piece += self.text.put(token)
            if self.text.stopped:
                break
        new = len(self.ids) - known
        self.handle.logprobs += logprobs[:new]
        reason: FinishReason | None = "stop" if stopped or self.text.stopped else None
        if reason is None and len(ids) >= self.sampling.max_new_tokens:
            reason = "length"
        if reason is None and self.handle.cancelled:
            reason = "cancelled"
        if reason:
            piece += self.text.end()
        elif self.constraint and new:  # there may be none yet: others' prompts are prefilled in between
            self.constraint.accept(self.ids[known:])
            self.allowed = self.constraint.allowed()
        if piece:
            self.handle.put(piece)
        if reason:
            self.handle.finish(self.completion(reason))
        return reason is not None

    def completion(self, reason: FinishReason) -> Completion:
        now = time.perf_counter()
        return Completion(
            text=self.handle.text,
            token_ids=self.ids,
            finish_reason=reason,
            stage_lengths=self.stage_lengths,
            kept=self.kept,
            scores=self.scores,
            cached=self.cached,
            logprobs=None if self.top_logprobs is None else self.handle.logprobs,
            queue_seconds=(self.admitted or now) - self.submitted,
            first_token_seconds=None if self.first is None else self.first - self.submitted,
            seconds=now - self.submitted,
        )
