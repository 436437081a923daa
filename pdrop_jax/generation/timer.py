"""Timing of jitted calls."""

import threading
import time
from typing import Any

import jax

from pdrop_jax.compilation_cache import COMPILED


class _Compilations(threading.local):
    """When this thread last compiled a program, by ``time.perf_counter``."""

    ended = 0.0


_compilations = _Compilations()


def _note(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == COMPILED:
        _compilations.ended = time.perf_counter()


jax.monitoring.register_event_duration_secs_listener(_note)


class Timer:
    """Measures jitted calls, compilation and execution separately, in seconds.

    A call traces, lowers and compiles before it executes anything, so all until the end of its last compilation counts
    as compiling. Calling the function alone is what costs nothing where it is compiled: ``lower`` would trace it anew.
    """

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self._seconds = 0.0

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = jax.block_until_ready(function(*args, **kwargs))
        ended = time.perf_counter()
        compiled = max(began, _compilations.ended)
        self.compile_seconds += compiled - began
        self._seconds += ended - compiled
        return result

    def lap(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds
