"""Progress of a run: a JSON Lines log, a progress bar on a terminal, and TensorBoard if it is installed."""

import contextlib
import json
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pdrop_jax.analysis.chips import CHIPS, DEVICE_KINDS
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_file
from pdrop_jax.train.step import Metrics

FILE = "log.jsonl"
DAMAGED = "log.damaged.jsonl"

# Dense bfloat16 peak of a device in FLOP/s, from the vendors' data sheets.
PEAKS = {kind: CHIPS[chip].flops for kind, chip in DEVICE_KINDS.items()} | {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
}


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together; None if the device kind is unknown."""
    peak = PEAKS.get(jax.devices()[0].device_kind)
    return peak and peak * jax.device_count()


class Progress:
    """Logs the steps after ``first``, up to ``steps``. Only process 0 writes.

    Lines of steps after ``first`` are removed from an existing log: they come from a run that was killed after its last
    checkpoint, and those steps are run again.

    Args:
      every: number of steps between log lines.
    """

    def __init__(self, folder: pathlib.Path, first: int, steps: int, every: int) -> None:
        self.main = jax.process_index() == 0
        self.every, self.steps = every, steps
        self._path = folder / FILE
        self._board: Any = None
        self._bar = tqdm(initial=first, total=steps, unit=" steps", disable=None if self.main else True)
        self._since, self._tokens, self._macs = time.perf_counter(), 0, 0.0
        self._invalid: Counter[str] = Counter()
        if self.main:
            with self._writing():
                _keep_before(self._path, first)
                self._file = self._path.open("a")
                self._board = _tensorboard(folder)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._bar.close()
        with contextlib.suppress(*([UserError] if kind else [])), self._writing():
            if self._board:
                self._board.close()
            if self.main:
                self._file.close()

    def event(self, event: str, step: int, **values: Any) -> None:
        """Logs an event, such as a compilation or a saved checkpoint."""
        self._write({"event": event, "step": step, **values})

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
        now = time.perf_counter()
        self._tokens += int(values.tokens)
        self._macs += macs
        self._invalid += invalid
        self._bar.update()
        if number % self.every and number < self.steps:
            return values
        seconds = max(now - self._since, 1e-9)
        line: dict[str, Any] = {
            "step": number,
            "loss": float(values.loss),
            "grad_norm": float(values.grad_norm),
            "learning_rate": learning_rate,
            "targets": int(values.targets),
            "tokens": int(values.tokens),
            "skipped": int(values.skipped),
            "invalid": dict(self._invalid),
            "macs": macs,
            "tokens_per_second": self._tokens / seconds,
            "seconds": seconds,
        }
        peak = peak_flops()
        if peak:
            line["mfu"] = 2 * self._macs / seconds / peak
        self._since, self._tokens, self._macs = now, 0, 0.0
        self._invalid.clear()
        self._write(line)
        shown = {"loss": f"{line['loss']:.4f}", "tokens/s": f"{line['tokens_per_second']:,.0f}"}
        self._bar.set_postfix(shown | ({"MFU": f"{100 * line['mfu']:.1f} %"} if peak else {}))
        if self._board:
            with self._writing():
                for name, value in line.items():
                    if isinstance(value, int | float) and name != "step":
                        self._board.add_scalar(name, np.float32(value), number)
        return values

    def _write(self, line: dict[str, Any]) -> None:
        if self.main:
            with self._writing():
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the log in {self._path.parent} cannot be written ({error.strerror}): free disk space and run the "
                "same command again to resume from the last checkpoint"
            ) from None


def read_line(raw: bytes) -> dict[str, Any] | None:
    """Parses a line of a log; None if it is damaged."""
    try:
        line = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _keep_before(path: pathlib.Path, first: int) -> None:
    """Removes lines of steps after ``first`` and an incomplete last line from a log.

    Damaged lines are moved to a separate file, with a warning.
    """
    if not path.exists():
        return
    check_file(path)
    damaged, aside = [], path.with_suffix(".unfinished")
    with path.open("rb") as old, aside.open("wb") as new:
        for raw in old:
            line = read_line(raw)
            if line is None and raw.endswith(b"\n"):
                damaged.append(raw)
            elif line is not None and line["step"] <= first:
                new.write(raw.rstrip(b"\n") + b"\n")
    if damaged:
        with path.with_name(DAMAGED).open("ab") as file:
            file.writelines(damaged)
        print(
            f"warning: moved damaged lines of {printable(path)} to {DAMAGED} in the same folder: {len(damaged)}",
            file=sys.stderr,
        )
    aside.replace(path)


def _tensorboard(folder: pathlib.Path) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(str(folder / "tensorboard"))
