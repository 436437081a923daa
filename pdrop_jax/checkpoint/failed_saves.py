"""What orbax still does for a save that has failed."""

import contextlib
import threading
import time

PATIENCE = 10.0  # seconds


def end_failed_save() -> None:
    """Cancels orbax's threads and waits for them, at most ``PATIENCE`` seconds. For after a save has raised an error.

    orbax raises the first error while other parts of the save still write, or wait for a folder that nobody creates any
    more. The interpreter joins their threads before it exits, so a run whose disk was full printed its error and then
    never ended. orbax cancels them itself only if the error comes after its own background thread has started.
    """
    until = time.monotonic() + PATIENCE
    threads = [thread for thread in threading.enumerate() if type(thread).__module__.startswith("orbax.")]
    while (threads := [thread for thread in threads if thread.is_alive()]) and time.monotonic() < until:
        for thread in threads:
            thread.cancel()  # type: ignore[attr-defined]  # again and again: no effect before its event loop runs
        with contextlib.suppress(Exception):  # raises what the thread has raised
            threads[0].join(0.1)
