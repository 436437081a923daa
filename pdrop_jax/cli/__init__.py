"""The ``pdrop`` command: one thin module for each subcommand, imported when it is called."""

import contextlib
import functools
import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pdrop_jax.errors import UserError, exit_on_error, printable

COMMANDS = {
    "generate": "answer questions about pictures",
    "chat": "answer questions about pictures one after another",
    "eval": "answer a file of questions",
    "score": "score a file of answers as the benchmark does",
    "train": "train a model as a recipe says",
    "convert": "make a checkpoint of ours out of a PyTorch one",
    "export": "write a checkpoint that transformers or the original LLaVA loads, or one of ours",
    "check": "replay recorded reference vectors",
    "study": "what dropping does to the answers, beside noise",
    "cost": "what a schedule costs, and the schedule for a budget",
    "plan": "ask the TPU compiler whether a job fits a slice",
}

LONGEST = 400  # characters of what tyro says of an option


def main() -> None:
    """Entry point. A user's mistake is one line on stderr and exit code 2."""
    # Said before transformers is imported: without torch it would advise to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal cannot show
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        wrong = name not in ("-h", "--help")
        out = sys.stderr if wrong else sys.stdout
        if wrong:
            print(f"pdrop: no command {printable(name)!r}", file=out)
        print("usage: pdrop COMMAND …   (pdrop COMMAND --help)", file=out)
        for command, purpose in COMMANDS.items():
            print(f"  {command:10}{purpose}", file=out)
        sys.exit(2 if wrong else 0)
    warnings.filterwarnings("ignore", category=UserWarning, module="tyro")
    warnings.filterwarnings("ignore", module="PIL")  # the sizes of pictures are checked in pdrop_jax.inputs.images
    module = importlib.import_module(f"pdrop_jax.cli.{name}")
    with exit_on_error(f"pdrop {name}: "):
        code = parsed(module.run, f"pdrop {name}", sys.argv[2:])()
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
        return functools.partial(run, *values, **options)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(bound, prog=prog, args=args)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_unboxed(said.getvalue())}; see {prog} --help") from None


def _unboxed(box: str) -> str:
    """The sentences in a box of tyro's, without its title and what it says of --help."""
    rows = [re.sub(r"[│─]+", " ", line).strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    text = " ".join(row for row in rows if row and row[0] not in "╭╰")
    text = text.partition("For full helptext")[0].strip().rstrip(".")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _flush() -> None:
    """Writes out what was printed, here where a full disk can still be reported."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more when it ends
        raise
