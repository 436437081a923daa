"""The ``pdrop`` command in a process of its own, which like a user's has no torch: transformers would import it."""

import signal
import sys
import time

WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
"""
PDROP = [sys.executable, "-c", WITHOUT_TORCH + "from pdrop_jax.cli import main; main()"]


def wait_for_lines(process, file, count):
    """Waits until ``file`` has ``count`` lines, which a command, a ``subprocess.Popen``, writes."""
    until = time.monotonic() + 240
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)


def kill_at_line(process, file, count=1):
    """Kills a command once ``file`` has ``count`` lines."""
    wait_for_lines(process, file, count)
    process.send_signal(signal.SIGKILL)
    process.communicate()
