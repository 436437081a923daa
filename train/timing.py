"""Where the time of a run goes: computing, waiting for data, compiling, saving and validating."""

import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

from pdrop_jax.analysis.chips import PEAK_FLOPS

T = TypeVar("T")

DATA, COMPILING, SAVING, VALIDATING = "waiting for data", "compiling", "saving", "validating"


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together; None if the device kind is unknown."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return peak and peak * jax.device_count()


class Timer:
    """Splits the time of a run, in seconds.

    Steps are dispatched ahead: while the device computes one, the host reads the data of the next. Only the time in
    which the device had finished the previous step and the data was not there counts as waiting for data.

    Attributes:
      spent: time since the start by activity, without the steps themselves; see the constants of this module.
      host: time in which the device had nothing to do because this host was not ready: it read data, moved it to the
        device, dispatched the step, or wrote the log.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.spent: dict[str, float] = collections.defaultdict(float)
        self.host = 0.0
        self._free: float | None = self.began  # when the device became free; None while it computes
        self._watcher = concurrent.futures.ThreadPoolExecutor(1, "step-timer")
        self._finished: concurrent.futures.Future[float] | None = None

    def close(self) -> None:
        self._watcher.shutdown(wait=False)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self.began

    @property
    def step_seconds(self) -> float:
        """Time since the start that was spent on steps, including their data."""
        return self.seconds - sum(seconds for name, seconds in self.spent.items() if name != DATA)

    def batches(self, source: Iterable[T]) -> Iterator[T]:
        """Yields from ``source`` and measures how long the device waits for it."""
        iterator = iter(source)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            free = self._free_since()
            if free is not None:
                self.spent[DATA] += time.perf_counter() - max(asked, free)
            yield batch

    def dispatched(self, began: float, result: jax.Array) -> None:
        """Must be called after each step is dispatched.

        Args:
          began: ``time.perf_counter()`` just before.
          result: an output of the step, which is not donated to the next one.
        """
        free = self._free_since()
        if free is not None:
            self.host += max(began - free, 0.0)
        self._free = None
        self._finished = self._watcher.submit(_wait_for, result)

    @contextlib.contextmanager
    def spending(self, activity: str) -> Iterator[None]:
        """Counts the time inside as time of ``activity``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            now = time.perf_counter()
            self.spent[activity] += now - began
            self._free = now if self._free_since() is not None else None

    def _free_since(self) -> float | None:
        if self._free is None and self._finished is not None and self._finished.done():
            self._free = self._finished.result()
        return self._free


def _wait_for(result: jax.Array) -> float:
    with contextlib.suppress(Exception):  # the loop gets the same error from the metrics
        jax.block_until_ready(result)
    return time.perf_counter()
