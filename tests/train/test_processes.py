"""When a process looks for others."""

import socket

import pytest

from pdrop_jax.errors import UserError
from pdrop_jax.train import processes
from pdrop_jax.train.processes import one_of_many, together


def test_slurm_is_recognised():
    assert one_of_many({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]"})
    assert not one_of_many({"SLURM_NTASKS": "2"})  # within an allocation, but not started by srun
    assert not one_of_many({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"})
    assert not one_of_many({})


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
        (("first:1", 2, 1), ", process 1 of 2, on {}: waiting for all processes at first:1, at most 300 s"),
        ((), ", on {}: waiting for all processes, at most 300 s"),
    ],
)
def test_a_process_says_that_it_has_come_before_it_waits(monkeypatch, capsys, given, says):
    def initialize(*arguments, initialization_timeout):
        assert arguments == (given or (None, None, None))
        assert initialization_timeout == 300
        assert capsys.readouterr().err == f"pdrop train{says.format(socket.gethostname())}\n"

    monkeypatch.setattr(processes, "one_of_many", lambda _: True)
    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes.jax.distributed, "shutdown", lambda: None)
    with together(*given):
        pass


def test_half_an_address_is_refused():
    with pytest.raises(UserError, match="belong together"), together(coordinator="localhost:1"):
        pass
