"""Timing of jitted calls."""

import time
from typing import Any

import jax


class Timer:
    """Measures jitted calls, compilation and execution separately, in seconds."""

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self._seconds = 0.0

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        function.lower(*args, **kwargs).compile()  # the call below finds the executable in jit's own cache
        compiled = time.perf_counter()
        result = jax.block_until_ready(function(*args, **kwargs))
        self.compile_seconds += compiled - began
        self._seconds += time.perf_counter() - compiled
        return result

    def lap(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds
