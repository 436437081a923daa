"""When a process looks for others."""

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pdrop_jax.errors import UserError
from pdrop_jax.train import processes
from pdrop_jax.train.processes import one_of_many, together, under_slurm
from pdrop_jax.train.roll_call import roll_call


def test_slurm_is_recognised():
    assert one_of_many({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]"})
    assert not one_of_many({"SLURM_NTASKS": "2"})  # within an allocation, but not started by srun
    assert not one_of_many({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"})
    assert not one_of_many({})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node1", "node1"), ("node1,other", "node1"), ("node[007-012,020],other", "node007"), ("a-b[3,5]", "a-b3")],
)
def test_slurm_says_who_is_who(hosts, first):
    said = {"SLURM_STEP_NODELIST": hosts, "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}
    assert under_slurm(said) == (f"{first}:{61000 + 345}", 8, 3)
    assert under_slurm({name: said[name] for name in list(said)[:-1]}) is None


def test_under_slurm_the_missing_are_named(monkeypatch):
    said = {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "3", "SLURM_PROCID": "0"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "START_SECONDS", 0.2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setattr(processes, "PORT", free.getsockname()[1] - 345)
    with pytest.raises(UserError, match="2 of 3 processes have not connected: 1, 2"), together():
        pass


def test_the_chips_of_a_cloud_tpu_are_recognised(monkeypatch, tmp_path):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(processes, "TPU_CHIPS", (str(tmp_path / "accel[0-9]*"),))
    assert one_of_many({})
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    assert not one_of_many({})


def test_a_process_alone_is_left_alone(monkeypatch):
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_: pytest.fail("nobody else is there"))
    with together():
        pass


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("first:1", 2, 1), ", process 1 of 2, on {}: waiting up to 300 s for all processes at first:1"),
        ((), ", on {}: waiting up to 300 s for all processes"),
    ],
)
def test_a_process_says_that_it_has_come_before_it_waits(monkeypatch, capsys, given, says):
    def initialize(*arguments, initialization_timeout):
        assert arguments == (given or (None, None, None))
        assert initialization_timeout == 300
        assert capsys.readouterr().err == f"pdrop train{says.format(socket.gethostname())}\n"

    monkeypatch.setattr(processes, "one_of_many", lambda _: True)
    monkeypatch.setattr(processes, "roll_call", lambda *_: None)
    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes.jax.distributed, "shutdown", lambda: None)
    with together(*given):
        pass


def test_half_an_address_is_refused():
    with pytest.raises(UserError, match="must be given together"), together(coordinator="localhost:1"):
        pass


def calls(numbers, num_processes, seconds=1.0):
    """What each process of ``numbers`` is told, all at once: "" or the error."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"

    def call(number):
        try:
            roll_call(where, num_processes, number, seconds)
        except UserError as error:
            return str(error).replace(where, "HERE")
        return ""

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(call, numbers))


def test_all_processes_come():
    assert calls(range(5), 5, seconds=60) == [""] * 5


def test_those_that_come_are_told_who_is_missing():
    expected = "2 of 5 processes have not connected: 2, 4 (waited 1 s at HERE)"
    assert calls([0, 1, 3], 5) == [expected] * 3


def test_without_the_first_process_nobody_waits_for_ever():
    (told,) = calls([1], 2)
    assert told.startswith("process 0 cannot be reached: ")


def test_a_number_that_two_processes_have():
    assert "two processes have --process-id 1 (waited 60 s at HERE)" in calls([0, 1, 1], 3, seconds=60)


def test_somebody_else_at_the_door():
    """A stranger's words are no process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def knock():
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("localhost", port)) as line:
                line.sendall(b"GET / HTTP/1.1\r\n\r\n")
                line.recv(1)
                return

    with ThreadPoolExecutor(3) as pool:
        stranger = pool.submit(knock)
        first = pool.submit(roll_call, f"localhost:{port}", 2, 0, 60)
        time.sleep(0.5)
        pool.submit(roll_call, f"localhost:{port}", 2, 1, 60).result()
        first.result()
        stranger.result()


@pytest.mark.parametrize(
    ("coordinator", "number"),
    [("localhost", 0), ("localhost:no", 0), ("localhost:1", 2), ("localhost:65536", 0), ("localhost:²", 0)],
)
def test_addresses_and_numbers_that_are_none(coordinator, number):
    with pytest.raises(UserError, match="expected HOST:PORT of process 0 and a process id between 0 and 1"):
        roll_call(coordinator, 2, number, 1)


@pytest.mark.parametrize("count", [0, -1, 2**31])
def test_numbers_of_processes_that_are_none(count):
    with pytest.raises(UserError, match=f"--num-processes is {count}, it must be between 1 and 65536"):
        roll_call("localhost:1", count, 0, 1)
