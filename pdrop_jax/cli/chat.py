"""``pdrop chat``: a conversation about images in the terminal."""

import contextlib
import io
import pathlib
import sys
from typing import Annotated, Any, Literal

from pdrop_jax.cli.options import (
    Attention,
    Dtype,
    Layers,
    Mesh,
    Model,
    NoVerify,
    Ratios,
    SamplingOptions,
    Score,
    device_mesh,
    progress,
    unset,
)
from pdrop_jax.errors import UserError, error_text, printable
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.schedule import parse_schedule

COMMANDS = (
    "/image FILE adds an image to the next question, /reset starts a new conversation, /help prints this, "
    "/exit ends the chat"
)


def run(
    model: Model = None,
    image: Annotated[tuple[pathlib.Path, ...], unset("FILE [FILE …]")] = (),
    mode: Literal["keep", "rerank"] = "rerank",
    layers: Layers = None,
    ratios: Ratios = None,
    score: Score = None,
    sampling: SamplingOptions = Sampling(),
    dtype: Dtype = None,
    attention: Attention = "auto",
    mesh: Mesh = (),
    no_verify: NoVerify = False,
) -> None:
    """Chat about images, one question a line, until an empty line or /exit. /help lists the commands.

    Args:
      image: Images of the first question.
      mode: "rerank" selects image tokens anew for every question; "keep" never brings back tokens that an earlier
        question dropped, which is faster.
    """
    from pdrop_jax.convert.pretrained import DEMO, load
    from pdrop_jax.generation.chat import Session
    from pdrop_jax.generation.engine import check_implementation
    from pdrop_jax.inputs.images import open_image

    check_implementation(attention)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused as a question
    pictures: list[Any] = [open_image(path) for path in image]
    with progress("loading"):
        devices = device_mesh(mesh)
        loaded = load(model or DEMO, parse_schedule(layers, ratios, score), dtype, devices, verify=not no_verify)
        session = Session(loaded, mode, implementation=attention)
    live = sys.stdin.isatty()
    if live:
        with contextlib.suppress(ImportError):  # not on every platform
            import readline  # noqa: F401  input() then edits lines and remembers those before
    while line := _read(live):
        try:
            if line.startswith("/"):
                command, _, argument = line.partition(" ")
                if command == "/exit":
                    break
                if command == "/reset":
                    session, pictures = Session(loaded, mode, implementation=attention), []
                elif command == "/image" and argument.strip():
                    pictures.append(open_image(argument.strip()))
                elif command == "/help":
                    print(COMMANDS)
                else:
                    raise UserError(f"unknown command {line!r}: {COMMANDS}")
                continue
            answer = session.ask(line, pictures, sampling, stream=_print_piece)
        except KeyboardInterrupt:
            break
        except UserError as error:
            if not live:
                raise
            print(error_text(error), file=sys.stderr)
            continue
        print()
        pictures = []
        if live:
            seconds = answer.compile_seconds + answer.prefill_seconds
            tokens = f"{answer.stage_lengths[0]} tokens, {answer.cached} of them cached"
            print(f"({tokens}; first token after {seconds:.2f} s)", file=sys.stderr)


def _read(live: bool) -> str:
    """The next line, stripped; an empty string at the end of the input."""
    try:
        return input("> " if live else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _print_piece(text: str) -> None:
    print(printable(text, keep="\n\t"), end="", flush=True)
