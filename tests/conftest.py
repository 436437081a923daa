"""Settings of all tests, and what several of their folders share."""

import dataclasses
import gc
import importlib.metadata
import json
import operator
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable

# Most of the tests' time was compiling tiny programs: unoptimised they compile ten times as fast. Most of the recorded
# vectors are replayed by programs as shipped (tests/parity/test_replay.py).
# jaxlib after 0.10 does not know the second flag, and aborts.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",  # many small modules cost a tenth more, for cores that are busy
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
    ]
)

# Workers share the cores: threads of torch and numpy that wait for each other there take twice the processor time.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

# Tests compile the same programs again and again, in all workers and in the processes that they start. A program that
# is read while another process still writes it is compiled, with a warning.
os.environ["JAX_COMPILATION_CACHE_DIR"] = (
    os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "PYTEST_XDIST_WORKER" in os.environ
    else tempfile.mkdtemp(prefix="pdrop-jax-tests-")
)
os.environ["PDROP_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"]  # for processes without JAX's settings
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # stack frames in programs, which nobody reads here

# The tolerances are those of float32: accelerators multiply float32 with fewer bits unless told otherwise. In processes
# that tests start, libtpu would look for its chips.
os.environ["JAX_PLATFORMS"] = "cpu"

# JAX and this package are imported where they are used: pytest starts its workers only after reading this file.
import hub_server  # noqa: F401  before transformers, because it decides where the Hub is
import hypothesis
import pytest

# Looking for garbage took 5 % of the tests' time, most of it among what has been imported and stays.
gc.set_threshold(100_000)

MOST_MAPS = 30_000  # of 65,530 that Linux gives a process

hypothesis.settings.register_profile("pdrop", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("pdrop")


# Their tests wait for processes: at the end of the suite one worker would be left alone with them.
FIRST = ("test_kill.py", "test_ray.py", "test_mesh.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish():
    gc.freeze()


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A process that keeps all that it has compiled runs out of memory maps (vm.max_map_count), and LLVM aborts it."""
    import jax

    import pdrop_jax.inputs  # noqa: F401  transformers with torch, before a command imports it without

    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module", params=[False, True], ids=["legacy0", "legacy1"])
def llama(request, tmp_path_factory):
    """The tokenizer that the golden ids were recorded with, and its setting of ``legacy``."""
    from pdrop_jax.inputs.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").symlink_to(pathlib.Path(__file__).parent / "golden/tokenizer/tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": request.param, "add_bos_token": True}
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **tokens}))
    return load_tokenizer(folder), request.param


@pytest.fixture(scope="session")
def short_demo(tmp_path_factory):
    """The first three layers of the demo model: trained, so that scores differ among tokens, and soon compiled."""
    import jax

    from pdrop_jax import DEMO, checkpoint
    from pdrop_jax.schedule import DropSchedule

    config, params = checkpoint.load(DEMO, schedule=DropSchedule.none())
    (layers,) = params["stages"].values()
    stages = {str(n): jax.tree.map(operator.itemgetter(slice(n, n + 1)), layers) for n in range(3)}
    text = dataclasses.replace(config.text, num_layers=3)
    config = dataclasses.replace(config, text=text, schedule=DropSchedule((1, 2), (0.5, 0.25)))
    folder = tmp_path_factory.mktemp("demo") / "short"
    checkpoint.save(folder, config, {**params, "stages": stages}, companions=DEMO, single_file=True)
    return folder


@dataclasses.dataclass
class Result:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def pdrop(monkeypatch, capfd) -> Callable[..., Result]:
    """Runs the command in this process, which has compiled the model already; see also ``test_a_real_process``."""
    from pdrop_jax.cli import main

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
