"""Progress of a run: its log, the lines and the bar on stderr, and warnings."""

import contextlib
import dataclasses
import pathlib
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from pdrop_jax.compilation_cache import CompilationStats
from pdrop_jax.errors import UserError, printable
from pdrop_jax.train.log_file import LogFile, log_errors
from pdrop_jax.train.recipe import Recipe
from pdrop_jax.train.step import Metrics
from pdrop_jax.train.timing import COMPILING, DATA, Timer, peak_flops
from pdrop_jax.train.trouble import COMPARE_EVERY, LossWatch, slow_hosts
from pdrop_jax.train.writers import open_writers

COUNTS = ("tokens", "pictures", "macs")  # what is added up over the steps of a line
HOST_NAME = 64  # bytes of a host's name that are shown


class Progress:
    """Context manager that reports the steps after ``first``, up to ``steps``. Only process 0 writes.

    See ``LogFile`` for what happens to an existing log.

    Attributes:
      timer: where the time goes; the loop tells it.
      main: whether this is process 0.
      events: names of the events that the log has of step ``first``; empty in other processes.
    """

    def __init__(self, folder: pathlib.Path, first: int, steps: int, recipe: Recipe) -> None:
        self.main = jax.process_index() == 0
        self.steps, self._recipe, self._folder = steps, recipe, folder
        self._writers, self._log = [], None
        self._loss_watch = LossWatch()
        self.events: set[str] = set()
        if self.main:
            self._log = LogFile(folder, first)
            self._loss_watch = LossWatch(self._log.losses)
            self.events = self._log.events
            with log_errors(folder):
                self._writers = open_writers(folder, recipe.log.wandb, dataclasses.asdict(recipe))
        self._bar = tqdm(initial=first, total=steps, unit=" steps", disable=None if self.main else True)
        self.timer = Timer()
        self._first = first
        self._line, self._total = dict.fromkeys(COUNTS, 0.0), dict.fromkeys((*COUNTS, "seconds"), 0.0)
        self._invalid: Counter[str] = Counter()
        self._since, self._spent, self._host = 0.0, dict[str, float](), (first, 0.0, 0.0)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._bar.close()
        self.timer.close()
        with contextlib.suppress(*([UserError] if kind else [])):
            with log_errors(self._folder):
                for writer in self._writers:
                    writer.close()
            if self._log:
                self._log.close()

    def say(self, text: str) -> None:
        """Prints a line on stderr, above the progress bar if there is one."""
        if self.main:
            self._bar.write(printable(text, keep="\n"), file=sys.stderr)
            sys.stderr.flush()

    def event(self, event: str, step: int, **values: Any) -> None:
        """Logs an event, such as a saved checkpoint."""
        if self._log:
            self._log.write({"event": event, "step": step, **values})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sends scalars to TensorBoard and W&B."""
        with log_errors(self._folder):
            for writer in self._writers:
                writer.write(step, values)

    def warn(self, event: str, step: int, text: str, **values: Any) -> None:
        """Logs an event that the user should know of, and prints it."""
        self.event(event, step, **values)
        self.say(f"warning: step {step:,}: {text}")

    @contextlib.contextmanager
    def compiling(self, what: str, step: int, **values: Any) -> Iterator[None]:
        """Context in which ``what`` is compiled, or read from the compilation cache; logs an event with ``values``."""
        self.say(f"compiling   {what} …")
        began = time.perf_counter()
        with CompilationStats() as stats, self.timer.spending(COMPILING):
            yield
        seconds, cached = time.perf_counter() - began, not stats.compiled
        how = f"read from the compilation cache, {stats.seconds_saved:,.0f} s saved" if cached else "compiled"
        self.say(f"compiling   {what}: {seconds:.1f} s, {how}")
        self.event("compiled", step, **values, seconds=seconds, cached=cached)

    def step(self, number: int, metrics: Metrics, macs: float, learning_rate: float, invalid: Counter[str]) -> Metrics:
        """Logs step ``number``, counted from 1.

        It waits for the metrics of the step, so call it after the next step has been dispatched.

        Args:
          macs: multiply-accumulates of the step.
          invalid: number of rows of the step that were excluded from the loss, by reason.

        Returns:
          The metrics, on the host.
        """
        values: Metrics = jax.device_get(metrics)
        _add(self._line, {"tokens": int(values.tokens), "pictures": int(values.pictures), "macs": macs})
        self._invalid += invalid
        self._bar.update()
        loss = float(values.loss)
        if values.skipped_in_row:
            text = (
                f"the gradient is not finite, so the step was skipped; steps skipped in a row: {values.skipped_in_row}"
            )
            self.warn("not_finite", number, text)
        if (limit := self._loss_watch.limit(loss)) is not None:
            text = f"the loss is {loss:.4f}, far above the recent ones (median + 10 MAD is {limit:.4f})"
            self.warn("loss_spike", number, text, limit=limit)
        if jax.process_count() > 1 and number % COMPARE_EVERY == 0:
            self._compare_hosts(number)
        if number % self._recipe.run.log_every == 0 or number >= self.steps:
            line = {
                "step": number,
                "loss": loss,
                "grad_norm": float(values.grad_norm),
                "learning_rate": learning_rate,
                "targets": int(values.targets),
                "tokens": int(values.tokens),
                "pictures": int(values.pictures),
                "skipped": int(values.skipped),
                "invalid": dict(self._invalid),
                "macs": macs,
                **self._lap(),
            }
            self._report(number, line)
        return values

    def _lap(self) -> dict[str, float]:
        """Times and rates of the steps since the last line."""
        now, spent = self.timer.seconds, dict(self.timer.spent)
        seconds = max(now - self._since, 1e-9)
        own = {name: spent[name] - self._spent.get(name, 0.0) for name in spent}
        data = own.pop(DATA, 0.0)
        steps = max(seconds - sum(own.values()), 1e-9)
        found = {"seconds": seconds, "data_seconds": data, "compute_seconds": steps - data, **rates(self._line, steps)}
        _add(self._total, self._line | {"seconds": steps})
        self._since, self._spent = now, spent
        self._line = dict.fromkeys(COUNTS, 0.0)
        self._invalid.clear()
        return found

    def _report(self, number: int, line: dict[str, Any]) -> None:
        if self._log:
            self._log.write(line)
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        self.scalars(number, numbers)
        shown = {"loss": f"{line['loss']:.4f}", "tokens/s": f"{line['tokens_per_second']:,.0f}"}
        self._bar.set_postfix(shown | ({"MFU": f"{100 * line['mfu']:.1f} %"} if "mfu" in line else {}))
        if self._bar.disable and (number in (self._first + 1, self.steps) or self._is_due(number)):
            waiting = line["data_seconds"] / (line["data_seconds"] + line["compute_seconds"])
            left = self.timer.step_seconds / (number - self._first) * (self.steps - number)
            self.say(
                f"step {number:,}/{self.steps:,}: loss {line['loss']:.4f}, gradient norm {line['grad_norm']:.3g}, "
                f"{rates_text(line)}, waiting for data {waiting:.0%}, {duration(left)} left"
            )

    def _is_due(self, number: int) -> bool:
        """Whether a line is printed: after every ``log.print_every`` steps, at the next line of the log."""
        every, lines = self._recipe.log.print_every, self._recipe.run.log_every
        return number // every > (number - lines) // every

    def _compare_hosts(self, number: int) -> None:
        """Names the hosts that the others wait for. All processes must call it at the same step."""
        first, host, seconds = self._host
        self._host = number, self.timer.host, self.timer.step_seconds
        steps = number - first
        own = np.array([self.timer.host - host, self._host[2] - seconds], np.float32) / steps
        name = socket.gethostname().encode()[:HOST_NAME].ljust(HOST_NAME)
        every, names = multihost_utils.process_allgather((own, np.frombuffer(name, np.uint8)))
        waits, step_seconds = every[:, 0].tolist(), float(every[0, 1])
        for process in slow_hosts(waits, step_seconds):
            host_name = bytes(names[process]).decode(errors="replace").strip()
            self.warn(
                "slow_host",
                number,
                f"host {host_name} (process {process}) keeps the others waiting: its devices waited for it for "
                f"{waits[process]:.3f} s of a step's {step_seconds:.3f} s, since step {first:,}",
                process=process,
                host=host_name,
                seconds=waits[process],
            )

    def summary(self, last: int) -> str:
        """What the steps up to ``last`` took, as text; empty if there were none."""
        if last == self._first:
            return ""
        total, spent = self.timer.seconds, self.timer.spent
        shares = {"computing": total - sum(spent.values()), **spent}
        parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in shares.items() if seconds)
        speed = rates(self._total, self._total["seconds"]) if self._total["seconds"] else {}
        return "\n".join(
            [
                f"time        {duration(total)} for {last - self._first:,} steps: {parts}",
                *([f"speed       {rates_text(speed)}"] if speed else []),
            ]
        )


def _add(into: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        into[name] += value


def rates(counts: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Tokens and pictures per second, and the MFU where the peak of the devices is known.

    Args:
      counts: number of tokens and pictures, and the "macs", all of the same steps.
    """
    found = {f"{name}_per_second": counts[name] / seconds for name in ("tokens", "pictures")}
    peak = peak_flops()
    return found | ({"mfu": 2 * counts["macs"] / seconds / peak} if peak else {})


def rates_text(found: Mapping[str, float]) -> str:
    text = f"{found['tokens_per_second']:,.0f} tokens/s, {found['pictures_per_second']:,.1f} pictures/s"
    return text + (f", MFU {found['mfu']:.1%}" if "mfu" in found else "")


def duration(seconds: float) -> str:
    """ "1:02:03" for 3,723 seconds, "12.3 s" below a minute."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
