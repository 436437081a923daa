"""A profile of some steps, for XProf or Perfetto: ``pdrop train … --profile START:STOP``."""

import pathlib
import re
from typing import Any

import jax

from pdrop_jax.errors import UserError

FOLDER = "profile"  # in the run folder


def parse_range(text: str) -> tuple[int, int]:
    """First and last step of "START:STOP", both counted from 1.

    Raises:
      UserError: it has another form, or STOP is before START.
    """
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
    start, stop = map(int, found.groups()) if found else (0, 0)
    if not 1 <= start <= stop:
        raise UserError(
            f"--profile {text}: expected the first and the last step to profile, such as 10:12, counted from 1"
        )
    return start, stop


class Trace:
    """Context manager that traces the steps START to STOP and writes the trace to ``folder``/profile.

    Args:
      steps: START and STOP; None traces nothing.
      first: number of steps taken before.
      last: last step of the run.

    Raises:
      UserError: START to STOP is not within the steps that are left.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: pathlib.Path, first: int, last: int) -> None:
        self.folder = folder / FOLDER
        self._start, self._stop = steps or (0, 0)
        self._running = False
        if steps and not first < self._start <= self._stop <= last:
            left = f"the steps {first + 1:,} to {last:,}" if first < last else "no steps"
            raise UserError(f"--profile {self._start}:{self._stop}: this run has {left} left to run")

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def before(self, step: int, state: Any) -> None:
        """Starts the trace once ``state`` is computed, if ``step`` is START."""
        if step == self._start:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow the host down and fill the trace
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._running = True

    def after(self, step: int, state: Any) -> bool:
        """Ends the trace once ``state`` is computed, if ``step`` is STOP. Returns whether it did."""
        if step != self._stop or not self._running:
            return False
        jax.block_until_ready(state)
        self._end()
        return True

    def _end(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
