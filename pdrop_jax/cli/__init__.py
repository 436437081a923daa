"""The ``pdrop`` command: one thin module for each subcommand, imported when it is called."""

import importlib
import os
import sys
import warnings

from pdrop_jax.errors import exit_on_error

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


def main() -> None:
    """Entry point. A user's mistake is one line on stderr and exit code 2."""
    # Said before transformers is imported: without torch it would advise to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import tyro

    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        wrong = name not in ("-h", "--help")
        out = sys.stderr if wrong else sys.stdout
        if wrong:
            print(f"pdrop: no command {name!r}", file=out)
        print("usage: pdrop COMMAND …   (pdrop COMMAND --help)", file=out)
        for command, purpose in COMMANDS.items():
            print(f"  {command:10}{purpose}", file=out)
        sys.exit(2 if wrong else 0)
    warnings.filterwarnings("ignore", category=UserWarning, module="tyro")
    module = importlib.import_module(f"pdrop_jax.cli.{name}")
    with exit_on_error(f"pdrop {name}: "):
        sys.exit(tyro.cli(module.run, prog=f"pdrop {name}", args=sys.argv[2:]))
