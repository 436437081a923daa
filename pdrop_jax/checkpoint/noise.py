"""What orbax and TensorStore print about a failed read or write besides the exception."""

import errno
import functools
import logging
import sys
import threading
import warnings
from types import TracebackType
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@functools.cache  # once per process: some of these messages only arrive while the interpreter shuts down
def silence_library_noise() -> None:
    """Hides what libraries print about a failed read or write besides the exception, which we report in one line.

    A filter on the loggers alone was tried and is not enough: at the first failure orbax closes its event loop while
    other reads and writes are pending, and each of these fails later in a TensorStore thread. TensorStore passes such
    failures to PyErr_WriteUnraisable or PyErr_Print, so they reach ``sys.unraisablehook`` or ``sys.excepthook`` and
    never a logger. The hooks below pass on everything else unchanged.
    """
    for name in ("absl", "asyncio"):  # orbax logs through absl; asyncio logs its tasks that nobody awaited
        logging.getLogger(name).addFilter(_is_not_from_orbax)
    sys.unraisablehook = functools.partial(_skip_orbax, sys.unraisablehook)
    sys.excepthook = functools.partial(_skip_closed_loop, sys.excepthook)
    threading.excepthook = functools.partial(_skip_full_disk, threading.excepthook)
    warnings.filterwarnings("ignore", "coroutine '_create_paths' was never awaited")  # orbax, if it cannot write
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")  # jax continues without it


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in f"{record.pathname} {record.getMessage()}"


def _is_closed_loop(error: BaseException | None) -> bool:
    return type(error) is RuntimeError and str(error) == "Event loop is closed"


def _skip_orbax(report: Any, found: Any) -> None:
    """``sys.unraisablehook`` without orbax's closed event loop and the coroutines that it abandoned."""
    code = getattr(found.object, "cr_code", None)
    if not (_is_closed_loop(found.exc_value) or (code and "orbax" in code.co_filename)):
        report(found)


def _skip_closed_loop(
    report: Any, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not _is_closed_loop(error):
        report(kind, error, traceback)


def _skip_full_disk(report: Any, found: threading.ExceptHookArgs) -> None:
    """``threading.excepthook`` for TensorBoard's writer thread: its next call raises the same error in our thread."""
    if not (isinstance(found.exc_value, OSError) and found.exc_value.errno in FULL_DISK):
        report(found)
