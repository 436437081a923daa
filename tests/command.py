"""The ``pdrop`` command in a process of its own, which like a user's has no torch: transformers would import it."""

import atexit
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import resource
import signal
import sys
import tempfile
import time
import unittest.mock

WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
"""
PDROP = [sys.executable, "-c", WITHOUT_TORCH + "from pdrop_jax.cli import main; main()"]
FORKS = multiprocessing.get_context("forkserver")


class Forked:
    """``pdrop`` as ``subprocess.Popen`` would run it, but forked from a process that has imported everything already.

    Imports are half of what a run of a tiny model takes. A test of how a command starts needs ``PDROP``.

    Attributes:
      stderr: what it has said so far. What it prints on stdout is lost.
    """

    def __init__(self, *arguments, env=None, cwd=None, largest_file=None):
        _serve_forks()
        self._said = tempfile.NamedTemporaryFile()  # noqa: SIM115  lives as long as this
        options = (list(map(str, arguments)), dict(env or os.environ), cwd, largest_file, self._said.name)
        self._process = FORKS.Process(target=_run, args=options)
        self._process.start()
        atexit.register(self._process.kill)  # multiprocessing would wait for what a failed test leaves behind

    @property
    def pid(self):
        return self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    @property
    def stderr(self):
        return pathlib.Path(self._said.name).read_text()

    def poll(self):
        return self.returncode

    def wait(self, timeout=300):
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise AssertionError(f"it still ran after {timeout} s: {self.stderr}")
        return self.returncode

    def finish(self, code=0, timeout=300):
        """Waits, and gives what it has said on stderr."""
        assert self.wait(timeout) == code, self.stderr
        return self.stderr

    def send_signal(self, number):
        assert self.returncode is None, self.stderr
        os.kill(self.pid, number)

    def kill(self):
        """Kills it if it still runs, and waits."""
        self._process.kill()
        self.wait()


@functools.cache
def _serve_forks():
    FORKS.set_forkserver_preload(["warm"])
    # Python 3.11 does not give its own path to the server.
    path = os.pathsep.join(filter(None, (str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=path):
        multiprocessing.forkserver.ensure_running()


def _run(arguments, environ, cwd, largest_file, said):
    with open(said, "ab", buffering=0) as file, open(os.devnull, "ab") as nothing:
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    os.environ.clear()
    os.environ.update(environ)  # XLA reads its flags when the first backend starts

    import jax
    import warm  # noqa: F401  a fork server ignores what it cannot import

    from pdrop_jax.cli import main
    from pdrop_jax.compilation_cache import EVERY_PROGRAM

    for name, value in (EVERY_PROGRAM | {"jax_compilation_cache_dir": environ["JAX_COMPILATION_CACHE_DIR"]}).items():
        jax.config.update(name, value)  # jax has read its own when it was imported
    if cwd:
        os.chdir(cwd)
    if largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["pdrop", *arguments]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without them, before Python 3.13


def wait_for_lines(process, file, count):
    """Waits until ``file`` has ``count`` lines, which a command, a ``Forked``, writes."""
    until = time.monotonic() + 240
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr
        assert time.monotonic() < until, process.stderr
        time.sleep(0.005)


def kill_at_line(process, file, count=1):
    """Kills a command once ``file`` has ``count`` lines."""
    wait_for_lines(process, file, count)
    process.kill()
