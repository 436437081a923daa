"""The ``pdrop`` command: one thin module for each subcommand, imported when it is called."""

import contextlib
import functools
import importlib
import importlib.metadata
import io
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pdrop_jax.cli.platforms import skip_missing_tpu
from pdrop_jax.compilation_cache import enable_in_environment
from pdrop_jax.errors import UserError, exit_on_error, printable
from pdrop_jax.paths import as_path
from pdrop_jax.without_torch import want_no_torch

COMMANDS = {
    "generate": "answer questions about images",
    "chat": "chat about images in the terminal",
    "serve": "answer over HTTP, in OpenAI's form",
    "eval": "answer a file of questions",
    "score": "score a file of answers by a benchmark's rules",
    "train": "train a model from a recipe",
    "data": "check training data, or pack them into shards",
    "convert": "convert a PyTorch checkpoint, or assemble one for training",
    "export": "write a checkpoint for transformers or the original LLaVA",
    "cache": "list or remove the models that were converted when they were first used",
    "check": "replay recorded reference vectors",
    "study": "measure what dropping does to a model's answers",
    "cost": "compute the cost of a schedule, or a schedule for a budget",
    "tune": "calibrate a schedule on samples, for a quantized model too",
    "plan": "check with the TPU compiler whether a job fits a slice",
}

MAX_ERROR_LENGTH = 400  # characters of an error message of tyro


def main() -> None:
    """Entry point. A user's mistake is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal cannot show
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"pdrop {importlib.metadata.version('pdrop-jax')}")
        sys.exit(0)
    if name not in COMMANDS:
        wrong = name not in ("-h", "--help")
        out = sys.stderr if wrong else sys.stdout
        if wrong:
            print(f"pdrop: unknown command {printable(name)!r}\n", file=out)
        print("Usage: pdrop COMMAND [OPTIONS]\n\nPyramidDrop for LLaVA in JAX.\n\nCommands:", file=out)
        for command, purpose in COMMANDS.items():
            print(f"  {command:10}{purpose}", file=out)
        print("\nRun 'pdrop COMMAND --help' for the options of a command, 'pdrop --version' for the version.", file=out)
        sys.exit(2 if wrong else 0)
    warnings.filterwarnings("ignore", category=UserWarning, module="tyro")
    warnings.filterwarnings("ignore", module="PIL")  # the sizes of pictures are checked in pdrop_jax.inputs.images
    skip_missing_tpu()
    enable_in_environment()
    module = importlib.import_module(f"pdrop_jax.cli.{name}")
    with exit_on_error(f"pdrop {name}: "):
        run = parsed(module.run, f"pdrop {name}", sys.argv[2:])
        if name != "convert":  # convert --check runs the models of transformers
            want_no_torch()
        code = run()
        _flush()
    sys.exit(code)


def parsed(run: Callable[..., int | None], prog: str, args: Sequence[str]) -> Callable[[], int | None]:
    """``run`` with the arguments of a command line.

    Raises:
      UserError: an option is unknown, missing or malformed. tyro would draw a box of several lines.
    """
    import tyro

    @functools.wraps(run)
    def bound(*values: Any, **options: Any) -> Any:
        # tyro makes gs:/bucket of gs://bucket
        return functools.partial(run, *map(_located, values), **{name: _located(x) for name, x in options.items()})

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(bound, prog=prog, args=args, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_unboxed(said.getvalue())}; see {prog} --help") from None


def _located(value: Any) -> Any:
    return as_path(value) if isinstance(value, pathlib.Path) else value


def _unboxed(box: str) -> str:
    """The sentences in a box of tyro's, without its title and what it says of --help."""
    rows = [re.sub(r"[│─]+", " ", line).strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    text = " ".join(row for row in rows if row and row[0] not in "╭╰")
    text = text.partition("For full helptext")[0].strip().rstrip(".")
    return text if len(text) <= MAX_ERROR_LENGTH else f"{text[: MAX_ERROR_LENGTH - 1]}…"


def _flush() -> None:
    """Writes out what was printed, here where a full disk can still be reported."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more when it ends
        raise
