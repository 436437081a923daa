"""Requests to stop a run early: SIGTERM and Ctrl-C."""

import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Context manager that records requests to stop the run: SIGTERM to any process, or Ctrl-C."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> "StopRequest":
        # With several processes, jax handles SIGTERM itself, so that all of them stop at the same step.
        signals = [signal.SIGINT, *([signal.SIGTERM] if jax.process_count() == 1 else [])]
        self._before = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def requested(self, step: int) -> bool:
        """Whether the run should stop after ``step``; the same in all processes after a SIGTERM."""
        return self._asked or multihost_utils.reached_preemption_sync_point(step)
