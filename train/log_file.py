"""The log of a run: JSON lines of steps and of events between them."""

import contextlib
import json
import pathlib
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_file
from pdrop_jax.train.trouble import WINDOW

FILE = "log.jsonl"
DAMAGED = "log.damaged.jsonl"


class LogFile:
    """The log in ``folder``, opened to continue after step ``first``.

    Lines of steps after ``first`` are removed from an existing log: they come from a run that was killed after its last
    checkpoint, and those steps are run again.

    Attributes:
      losses: the last losses in the log.
      events: names of the events of step ``first``.

    Raises:
      UserError: the log cannot be written. So do the methods.
    """

    def __init__(self, folder: pathlib.Path, first: int) -> None:
        self._path = folder / FILE
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.events: set[str] = set()
        with self._writing():
            for line in _keep_before(self._path, first):
                if "loss" in line:
                    self.losses.append(line["loss"])
                if line["step"] == first and "event" in line:
                    self.events.add(str(line["event"]))
            self._file = self._path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        with self._writing():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        with self._writing():
            self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with log_errors(self._path.parent):
            yield


@contextlib.contextmanager
def log_errors(folder: pathlib.Path) -> Iterator[None]:
    """Context that turns an OSError into a UserError about the logs in ``folder``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the log in {folder} cannot be written ({error.strerror}): free disk space and run the "
            "same command again to resume from the last checkpoint"
        ) from None


def read_line(raw: bytes) -> dict[str, Any] | None:
    """Parses a line of a log; None if it is damaged."""
    try:
        line = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    return line if isinstance(line.get("loss", 0.0), float | int) else None


def _keep_before(path: pathlib.Path, first: int) -> Iterator[dict[str, Any]]:
    """Removes lines of steps after ``first`` and an incomplete last line from a log, and yields the other lines.

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
                yield line
    if damaged:
        with path.with_name(DAMAGED).open("ab") as file:
            file.writelines(damaged)
        print(
            f"warning: moved damaged lines of {printable(path)} to {DAMAGED} in the same folder: {len(damaged)}",
            file=sys.stderr,
        )
    aside.replace(path)
