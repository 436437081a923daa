"""Signs of trouble: spikes of the loss, steps without a finite gradient, slow hosts, and where the time goes."""

import os
import random
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import events, lines_of, recipe_in

from pdrop_jax.train.progress import Progress, duration
from pdrop_jax.train.step import Metrics
from pdrop_jax.train.timing import DATA, SAVING, Timer
from pdrop_jax.train.trouble import COMPARE_EVERY, FEWEST, LossWatch, slow_hosts


def noisy(count, seed=0):
    rng = random.Random(seed)
    return [3 * 0.99**n + rng.gauss(1, 0.1) for n in range(count)]


@pytest.mark.parametrize(
    ("before", "loss", "is_spike"),
    [
        (noisy(60), 9.0, True),
        (noisy(60), 3.0, False),
        (noisy(FEWEST - 1), 1000.0, False),  # too few to compare with
        ([2.0] * 50, 2.1, False),  # no spread at all, but within a tenth
        ([2.0] * 50, 2.3, True),
        ([*noisy(30), *[float("nan")] * 60], 9.0, True),  # steps that were skipped do not count
        (noisy(60), float("nan"), False),
        (noisy(60), float("inf"), False),
        ([0.0] * 50, 0.0, False),
    ],
)
def test_spikes(before, loss, is_spike):
    watch = LossWatch()
    assert [x for x in before if watch.limit(x) is not None] == []
    limit = watch.limit(loss)
    assert (limit is not None) == is_spike
    assert not is_spike or np.median(before[-100:]) < limit < loss or np.isnan(np.median(before))
    assert LossWatch(before).limit(loss) == limit  # as after a resume


def test_a_spike_does_not_hide_the_next():
    watch = LossWatch(noisy(60))
    assert all(watch.limit(20.0) is not None for _ in range(5))


@pytest.mark.parametrize(
    ("host_seconds", "slow"),
    [
        ([0.01, 0.01, 0.30, 0.01], [2]),
        ([0.01, 0.02, 0.03, 0.02], []),
        ([0.01, 0.30], [1]),
        ([0.3, 0.3, 0.3], []),  # all wait for the same disk
        ([0.5, 0.01, 0.01, 0.4], [0, 3]),
        ([0.2], []),
    ],
)
def test_hosts_that_the_others_wait_for(host_seconds, slow):
    assert slow_hosts(host_seconds, step_seconds=1.0) == slow


STEPS_OF_TWO = """
import sys, pathlib, time
import jax, jax.numpy as jnp
from tiny_run import events, lines_of, recipe_in
from pdrop_jax.train.progress import Progress
from pdrop_jax.train.step import Metrics
from pdrop_jax.train.trouble import COMPARE_EVERY
folder, port, process = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, process)
metrics = Metrics(jnp.float32(1), jnp.float32(1), *map(jnp.int32, (7, 100, 3, 0, 0)))

def data():
    for number in range(COMPARE_EVERY):
        time.sleep(0.03 if process else 0.0)
        yield number + 1

with Progress(folder, 0, COMPARE_EVERY, recipe_in(folder)) as progress:
    for number in progress.timer.batches(data()):
        progress.timer.dispatched(time.perf_counter(), jnp.float32(number) + 1)
        progress.step(number, metrics, 1e9, 0.1, {})
"""


def test_the_slower_of_two_hosts_is_named(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", STEPS_OF_TWO, tmp_path, port, str(process)],
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    host = f"step {COMPARE_EVERY}: host {socket.gethostname()} (process 1) keeps the others waiting"
    assert [line.startswith(f"warning: {host}") for line in said[0].splitlines() if "warning" in line] == [True]
    assert "warning" not in said[1]
    (event,) = [line for line in lines_of(tmp_path) if line.get("event") == "slow_host"]
    assert (event["step"], event["process"], event["host"]) == (COMPARE_EVERY, 1, socket.gethostname())
    assert event["seconds"] > 0.02


def test_troubles_are_named_with_their_step(tmp_path, capsys):
    with Progress(tmp_path, 0, 40, recipe_in(tmp_path)) as progress:
        for number, loss in enumerate(noisy(40), 1):
            loss, skipped = (50.0 if number == 30 else loss), int(number in (33, 34))
            row = {33: 1, 34: 2}.get(number, 0)
            metrics = Metrics(jnp.float32(loss), jnp.float32(1), *map(jnp.int32, (7, 100, 3, skipped, row)))
            progress.step(number, metrics, 1e9, 0.1, {})
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings[0].startswith(
        "warning: step 30: the loss is 50.0000, far above the recent ones (median + 10 MAD is "
    )
    said = "the gradient is not finite, so the step was skipped; steps skipped in a row:"
    assert warnings[1:] == [f"warning: step 33: {said} 1", f"warning: step 34: {said} 2"]
    assert events(tmp_path) == [
        ("loss_spike", 30),
        ("not_finite", 33),
        ("not_finite", 34),
    ]


@jax.jit
def _busy(x, rounds):
    return jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x @ x), x)


def _timer_of_steps(data_seconds, rounds):
    """A timer after two steps of that many rounds, whose data takes so long."""
    timer, x = Timer(), jnp.eye(64)

    def source():
        for _ in range(2):
            time.sleep(data_seconds)
            yield x

    for batch in timer.batches(source()):
        began = time.perf_counter()
        result = _busy(batch, rounds)
        timer.dispatched(began, result)
    with timer.spending(SAVING):
        jax.block_until_ready(result)
        time.sleep(0.05)
    timer.close()
    assert timer.spent[SAVING] >= 0.05
    assert sum(timer.spent.values()) <= timer.seconds
    return timer


def test_only_data_that_the_device_waits_for_is_waited_for():
    """The first batch is waited for; the second comes while the device computes, or does not."""
    _timer_of_steps(0.0, 100)  # compiles
    began, rounds = time.perf_counter(), 2000
    _busy(jnp.eye(64), rounds).block_until_ready()
    rounds = round(rounds * 0.8 / (time.perf_counter() - began))  # so many take 0.8 s
    data = 0.2
    hidden, idle = _timer_of_steps(data, rounds), _timer_of_steps(data, 1)
    assert data <= hidden.spent[DATA] < 1.5 * data
    assert 1.9 * data < idle.spent[DATA]
    assert idle.host >= 1.9 * data
    assert hidden.host < 1.5 * data


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "0:01:00"), (3723.4, "1:02:03")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
