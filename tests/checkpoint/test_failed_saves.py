"""What a save that has failed leaves behind."""

import asyncio
import threading

from orbax.checkpoint._src.futures.future import CommitFuture

from pdrop_jax.checkpoint.failed_saves import end_failed_save


def test_a_part_that_waits_for_ever_is_ended():
    before = set(threading.enumerate())
    waiting = CommitFuture(asyncio.sleep(3600), name="waits")
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"waits"}
    end_failed_save()
    assert "waits" not in {thread.name for thread in threading.enumerate()}
    assert waiting is not None
