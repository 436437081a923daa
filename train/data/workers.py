"""Worker processes: results in the order of the tasks, and no worker that outlives the main process."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pdrop_jax.errors import UserError
from pdrop_jax.without_torch import want_no_torch

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Yields ``work(task)`` of each task, with twice as many tasks under way as there are worker processes.

    Args:
      workers: number of processes; with 1, the work is done in this one.

    Raises:
      UserError: a worker was killed; or what ``work`` raises.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")  # jax and tokenizers have threads, which a fork would break
    with ProcessPoolExecutor(workers, context, initializer=_begin) as pool:
        waiting: collections.deque[Future[R]] = collections.deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(work, task))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, probably for its memory: run the same command with fewer workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    begin_worker()


def begin_worker(*_numbers: int) -> None:
    """First call in a worker process, before it imports what its work needs. grain passes two numbers."""
    want_no_torch()
    _end_with_parent()


def _end_with_parent() -> None:
    """Makes this worker process exit when the main process ends, even if that is killed.

    Otherwise the worker would wait forever for space in a queue that nobody reads. ``parent.join`` waits on a pipe
    whose other end only the parent holds. PR_SET_PDEATHSIG is no alternative: it fires when the thread that started the
    worker ends, and grain starts workers from a thread of its own.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
