"""The ``pdrop`` command in the process of the tests."""

import dataclasses
import sys
from collections.abc import Callable

import pytest

from pdrop_jax.cli import main


@dataclasses.dataclass
class Result:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def pdrop(monkeypatch, capfd) -> Callable[..., Result]:
    """Runs the command in this process, which has compiled the model already; see also ``test_a_real_process``."""

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["pdrop", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Result(int(end.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def fails(pdrop) -> Callable[..., str]:
    """Runs the command and gives the one line that a user's mistake prints: exit code 2, nothing on stdout."""

    def run(*args: object) -> str:
        result = pdrop(*args)
        assert result.code == 2, result
        assert result.stdout == ""
        (line,) = result.stderr.strip().splitlines()
        return line

    return run
