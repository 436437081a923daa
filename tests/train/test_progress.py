"""The log of a run: what stays of it when the run goes on, and TensorBoard beside it."""

import errno
import json
import logging
import sys
import threading
import types
import warnings
from collections import Counter

import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import recipe_in

from pdrop_jax.checkpoint import storage
from pdrop_jax.train import progress, timing, writers
from pdrop_jax.train.progress import Progress
from pdrop_jax.train.step import Metrics

METRICS = Metrics(jnp.float32(2.5), jnp.float32(1.5), *map(jnp.int32, (7, 100, 3, 0, 0)))


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def run(folder, first, last, every=1, steps=9):
    with Progress(folder, first, steps, recipe_in(folder, run_log_every=every)) as log:
        for number in range(first + 1, last + 1):
            log.step(number, METRICS, 1e9, 0.25, Counter(corrupt=1))
        log.event("saved", last)


def test_what_comes_after_the_checkpoint_is_taken_out(tmp_path):
    run(tmp_path, 0, 5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run(tmp_path, 3, 4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 4]


def test_a_line_of_several_steps_counts_them_all(tmp_path):
    run(tmp_path, 0, 6, every=4, steps=6)
    four, six = (line for line in lines(tmp_path) if "loss" in line)
    assert (four["step"], six["step"]) == (4, 6)
    assert (four["invalid"], six["invalid"]) == ({"corrupt": 4}, {"corrupt": 2})
    assert four["tokens_per_second"] == pytest.approx(400 / four["seconds"])
    assert four["pictures_per_second"] == pytest.approx(12 / four["seconds"])
    assert "mfu" not in four


def test_mfu_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "peak_flops", lambda: 4e12)
    run(tmp_path, 0, 1)
    line = lines(tmp_path)[0]
    assert line["mfu"] == pytest.approx(2e9 / line["seconds"] / 4e12)


def test_peaks_are_of_all_devices(monkeypatch):
    devices = [types.SimpleNamespace(device_kind="TPU v5 lite")] * 8
    monkeypatch.setattr(timing.jax, "devices", lambda: devices)
    monkeypatch.setattr(timing.jax, "device_count", lambda: 8)
    assert timing.peak_flops() == 8 * 197e12
    devices[0].device_kind = "abacus"
    assert timing.peak_flops() is None


def test_tensorboard_gets_the_numbers_if_it_is_installed(tmp_path):
    run(tmp_path, 0, 2)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, float(e.tensor_proto.float_val[0])) for e in board.Tensors("loss")] == [(1, 2.5), (2, 2.5)]


def test_without_tensorboard_there_is_the_log(tmp_path, monkeypatch):
    find = writers.importlib.util.find_spec
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    run(tmp_path, 0, 2)
    assert not (tmp_path / "tensorboard").exists()
    assert len(lines(tmp_path)) == 3


def test_only_the_noise_of_a_failed_write_is_kept_off_stderr(monkeypatch, capsys):
    for hook in ("sys.excepthook", "sys.unraisablehook", "threading.excepthook"):
        monkeypatch.setattr(hook, lambda kind, *rest: print(getattr(kind, "exc_value", rest[:1])))
    monkeypatch.setattr(warnings, "filters", [*warnings.filters])
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        monkeypatch.setattr(logger, "filters", [])
    storage.silence_library_noise.__wrapped__()
    errors = RuntimeError("Event loop is closed"), RuntimeError("another"), ValueError("Event loop is closed")
    for error in errors:
        sys.excepthook(type(error), error, None)
    for error in (OSError(errno.ENOSPC, "full"), OSError(errno.ENOENT, "none"), ValueError("wrong")):
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, None)))
    shown = capsys.readouterr().out
    assert [word in shown for word in ("another", "ValueError", "full", "none", "wrong")] == [
        True,
        True,
        False,
        True,
        True,
    ]
    assert shown.count("Event loop is closed") == 1
    coroutines = [
        types.SimpleNamespace(cr_code=types.SimpleNamespace(co_filename=f"/x/{x}/y.py")) for x in ("orbax", "z")
    ]
    for error, source in [*((error, None) for error in errors), *((OSError(source), source) for source in coroutines)]:
        sys.unraisablehook(types.SimpleNamespace(exc_value=error, object=source))
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["another", "Event loop is closed", str(OSError(coroutines[1]))]
    for logger in loggers:
        for path, message in (("/x/orbax/future.py", "raised"), ("/x/asyncio.py", "of orbax"), ("/x/absl.py", "other")):
            record = logging.LogRecord(logger.name, logging.ERROR, path, 1, message, None, None)
            assert bool(logger.filter(record)) == (message == "other")
