"""What libraries say of a disk that is full, pages of it and long after: the one error that we raise says it."""

import errno
import functools
import logging
import sys
import threading
import warnings
from types import TracebackType
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@functools.cache  # once in a process: some of it comes when the interpreter already ends
def hush_full_disk() -> None:
    """Keeps it off stderr, and nothing else."""
    for name in ("absl", "asyncio"):  # orbax's logger, and where its tasks are collected that nobody waited for
        logging.getLogger(name).addFilter(_is_not_of_orbax)
    sys.excepthook = functools.partial(_unless_loop_is_closed, sys.excepthook)
    threading.excepthook = functools.partial(_unless_disk_is_full, threading.excepthook)
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")  # jax goes on without


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in f"{record.pathname} {record.getMessage()}"


def _unless_loop_is_closed(
    print_error: Any, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """``sys.excepthook`` for all but the writes that come back when orbax has closed its event loop."""
    if not (kind is RuntimeError and str(error) == "Event loop is closed"):
        print_error(kind, error, traceback)


def _unless_disk_is_full(print_error: Any, found: threading.ExceptHookArgs) -> None:
    """``threading.excepthook``: what TensorBoard's thread could not write it raises at the next call too."""
    if not (isinstance(found.exc_value, OSError) and found.exc_value.errno in FULL):
        print_error(found)
