"""What orbax still does for a save that has failed."""

import contextlib
import threading
import time
import warnings
from collections.abc import Set

from orbax.checkpoint._src.futures.future import AwaitableSignalsContract, set_signals

PATIENCE = 10.0  # seconds


def end_failed_save(others: Set[threading.Thread] = frozenset()) -> None:
    """Ends orbax's threads and waits for them, at most ``PATIENCE`` seconds. Call it after a save has failed.

    orbax raises the first error while other parts of the save still write, or wait, some of them for 300 s, for a
    folder that will never be created. The interpreter joins their threads before it exits, so a run whose disk was full
    printed its error but took minutes to exit. orbax's own ``cancel`` reaches them only if the error came after its
    background thread had started, and has no equivalent for what waits.

    Args:
      others: threads that were there before, which belong to other saves.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # of parts that are cancelled before they begin
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        threads = [thread for thread in threading.enumerate() if hasattr(thread, "_receive_signals")]
        threads = [thread for thread in threads if thread not in others]
        if not threads:
            return
        with contextlib.suppress(Exception):  # the save's own error is the one to report
            for thread in threads:
                thread.cancel()  # type: ignore[attr-defined]
            for operation in {thread._operation_id for thread in threads}:  # type: ignore[attr-defined]
                awaited = AwaitableSignalsContract.get_awaitable_signals_from_contract(operation)
                set_signals(awaited, operation_id=operation)
        threading.Thread.join(threads[0], 0.1)
