"""What a save that has failed leaves behind."""

import gc
import threading
import time

import jax.numpy as jnp
import pytest
from orbax.checkpoint._src.futures.future import CommitFuture
from orbax.checkpoint._src.path import atomicity

from pdrop_jax.checkpoint.failed_saves import end_failed_save
from pdrop_jax.errors import UserError
from pdrop_jax.train.checkpoints import CheckpointMetadata, Checkpoints
from pdrop_jax.train.recipe import RunRecipe


async def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_no_thread_that_waits(tmp_path, monkeypatch):
    """Its parts wait for a folder that cannot be made, which takes orbax 300 s."""
    before, began = set(threading.enumerate()), time.monotonic()
    monkeypatch.setattr(atomicity, "_create_paths", full_disk)
    with Checkpoints(tmp_path, RunRecipe(folder=str(tmp_path))) as checkpoints:
        checkpoints.save(CheckpointMetadata(1, {}, {}, "", ""), {"a": jnp.ones(4), "b": jnp.ones(8)})
        with pytest.raises(UserError, match=r"step 1 cannot be written to .*No space left"):
            checkpoints.wait()
    assert time.monotonic() - began < 8
    assert not [x.name for x in set(threading.enumerate()) - before if type(x).__module__.startswith("orbax")]
    gc.collect()  # within the test, whose warnings are set up by what it calls


def test_other_saves_go_on():
    finish = threading.Event()

    async def work():
        while not finish.is_set():
            time.sleep(0.01)
        return "saved"

    other = CommitFuture(work(), name="other")
    end_failed_save(set(threading.enumerate()))
    finish.set()
    assert other.result(timeout=10) == "saved"
