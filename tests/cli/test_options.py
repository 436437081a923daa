"""Every option of every command with values that it must not have: exit code 0, or 2 and one line, and soon.

The options come from the signatures of the commands, so that a new one is tried without a word here. No call answers a
question: each has something wrong with it that is found once the model is loaded, unless its value is refused before.
"""

import dataclasses
import importlib
import inspect
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import typing

import pytest
import tyro
from command import PDROP

from pdrop_jax.cli import COMMANDS

GRIDS = pathlib.Path(__file__).parents[2] / "examples" / "grids"
DEMO = pathlib.Path(__file__).parents[2] / "pdrop_jax" / "demo"
SECONDS = 5  # of one call

WORDS = ["", "x", "None", "data=0", "fsdp=1e9", "\x1b[31m\n", "\udcff", "x" * 5000]
NUMBERS = ["0", "-1", "2147483648", "-9223372036854775809", "9" * 5000, "nan", "inf", "1e300"]
# Made by ``places``, below the current folder.
PATHS = ["/dev/zero", "/dev/stdin", "/dev/full", "fifo", "socket", "folder", "garbage", "nowhere/x", "loop", "\udcff"]

# What a call has besides the option that is tried; files of a bare name are made by ``places``.
BASE = {
    "generate": {"prompt": ["<image> Who?"], "image": ["garbage"]},
    "chat": {},
    "eval": {"model": [DEMO], "questions": ["long.jsonl"], "images": [GRIDS], "out": ["a.jsonl"]},
    "score": {"benchmark": ["gqa"], "answers": ["answers.jsonl"], "annotations": [GRIDS / "annotations.json"]},
    "train": {"recipe": ["nowhere.toml"]},
    "data": {"action": ["pack"], "source": ["long.jsonl"], "out": ["new"], "workers": ["1"]},
    "convert": {"source": ["folder"], "out": ["new"]},
    "export": {"model": ["folder"], "out": ["new"], "format": ["hf"]},
    "cache": {"action": ["list"]},
    "check": {"folder": ["folder"]},
    "study": {"model": [DEMO], "questions": ["long.jsonl"], "images": [GRIDS]},
    "cost": {},
    "plan": {"model": ["llava-1.5-7b"], "topology": ["nowhere"]},
    "serve": {"model": ["folder"], "host": ["nowhere"]},  # or an empty name would be served, by the demo model
    "tune": {"samples": ["long.jsonl"], "model": [DEMO], "images": [GRIDS]},
}


def options(command):
    """(parameter, name on the command line or "" if it has none, kinds of values) of each option of a command."""
    run = importlib.import_module(f"pdrop_jax.cli.{command}").run
    positional = tyro.conf.Positional[int].__metadata__[0]
    for name, kind in typing.get_type_hints(run, include_extras=True).items():
        if name == "return":
            continue
        notes = getattr(kind, "__metadata__", ())
        if dataclasses.is_dataclass(typing.get_args(kind)[0] if notes else kind):
            fields = dataclasses.fields(typing.get_args(kind)[0])
            yield from ((field.name, f"--{field.name.replace('_', '-')}", str(field.type)) for field in fields)
            continue
        own = next((note.name for note in notes if getattr(note, "name", None)), name)
        text = str(typing.get_args(kind)[0] if notes else kind)
        yield name, "" if positional in notes else f"--{own.replace('_', '-')}", text


def values(kind):
    if kind == str(bool):
        return [None]
    if "Path" in kind:
        return [*WORDS, *PATHS]
    if "int" in kind or "float" in kind:
        return ["x", *NUMBERS]
    return WORDS if "Literal" in kind else [*WORDS, *NUMBERS, *PATHS]


def command_line(command, given):
    places, named = [], []
    for name, option, _ in options(command):
        if name in given:
            words = [str(word) for word in given[name] if word is not None]
            (named if option else places).extend([option, *words] if option else words)
    return [command, *places, *named]


def table(command):
    """Command lines: each option of ``command`` with each value, and nothing else wrong."""
    for name, _, kind in options(command):
        for value in values(kind):
            yield command_line(command, BASE[command] | {name: [value]})


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The current folder, with what a path may lead to that is no ordinary file."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    pathlib.Path("folder").mkdir()
    pathlib.Path("garbage").write_bytes(bytes(range(256)))
    pathlib.Path("loop").symlink_to("loop")
    pathlib.Path("long.jsonl").write_text(json.dumps({"question_id": 1, "text": "word " * 3000}))
    answers = [
        json.dumps({"question_id": name, "text": "x"}) for name in json.loads((GRIDS / "annotations.json").read_text())
    ]
    pathlib.Path("answers.jsonl").write_text("\n".join(answers))
    return tmp_path


def test_every_command_and_option_is_tried():
    assert set(BASE) == set(COMMANDS)
    for command in COMMANDS:
        run = importlib.import_module(f"pdrop_jax.cli.{command}").run
        names = list(inspect.signature(run).parameters)
        if "sampling" in names:
            at = names.index("sampling")
            names[at : at + 1] = ["max_new_tokens", "temperature", "top_k", "top_p", "seed"]
        assert [name for name, _, _ in options(command)] == names
    assert sum(len(list(table(command))) for command in COMMANDS) > 1000


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_with_any_value_is_a_line_or_taken(command, pdrop, places, monkeypatch):
    before = sorted(os.listdir())
    pdrop(*command_line(command, BASE[command]))  # what is imported or compiled the first time is not timed
    for line in table(command):
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        began = time.perf_counter()
        result = pdrop(*line)
        assert time.perf_counter() - began < SECONDS, line
        assert result.code in (0, 2), (line, result)
        if result.code == 2:
            assert result.stdout == "", line
            assert len(result.stderr.splitlines()) == 1, (line, result.stderr)
            assert result.stderr.startswith(f"pdrop {command}: "), (line, result.stderr)
            assert "\x1b" not in result.stderr, line
        else:
            assert result.stderr == "", line
        assert sorted(os.listdir()) == before, line


def test_a_real_process_with_bytes_that_are_not_utf_8():
    result = subprocess.run([*PDROP, "generate", "--prompt", b"caf\xe9"], capture_output=True, timeout=120)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert b"pdrop generate: the text is no valid Unicode at character " in line
