"""Tables of damage: each key of a recipe with values that it cannot have, and lines that a log cannot hold."""

import dataclasses
import json
import os
import random
import time
from collections import Counter

import jax.numpy as jnp
import pytest
from tiny_run import recipe_in, write_data, write_start

from pdrop_jax.errors import UserError
from pdrop_jax.train.log_file import read_line
from pdrop_jax.train.loop import open_job
from pdrop_jax.train.progress import Progress
from pdrop_jax.train.recipe import Recipe, load_recipe
from pdrop_jax.train.step import Metrics

SECONDS = 10.0  # that a recipe may take to be refused or opened, on a busy machine
NAN, INFINITY = float("nan"), float("inf")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = {
    "null": None,
    "text": "x",
    "empty": "",
    "control": "a\x1b[31m\n",
    "long": "x" * 10_000,
    "zero": 0,
    "negative": -1,
    "half": 0.5,
    "large": 10**9,
    "int32": 2**31,
    "int64": 2**63,
    "huge": 10**30,
    "digits": 10**4000,
    "nan": NAN,
    "infinity": INFINITY,
    "minus infinity": -INFINITY,
    "tiny": 5e-324,
    "true": True,
    "list": [],
    "numbers": [1, 2, 3],
    "wrong numbers": [-1, NAN, 10**30],
    "strings": ["x", ""],
    "nested": nested(150),
    "deep": nested(900),
    "object": {},
    "objects": [{"a": 1}],
}
KEYS = [f"{part.name}.{key.name}" for part in dataclasses.fields(Recipe) for key in dataclasses.fields(part.type)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_data(folder / "data")
    write_start(folder / "start")
    return folder


def loaded(path, data, settings=()):
    """The recipe in a file, or the message that refuses it."""
    path.write_text(json.dumps(data))
    began = time.perf_counter()
    try:
        found = load_recipe(path, settings)
    except UserError as error:
        found = str(error)
    assert time.perf_counter() - began < SECONDS
    assert isinstance(found, Recipe) or (len(found) < 600 and "\n" not in found)
    return found


def opened(recipe):
    """Does all that a run does before it compiles. None, or the message that refuses the recipe."""
    began, message = time.perf_counter(), None
    try:
        open_job(recipe)
    except UserError as error:
        message = str(error)
    assert time.perf_counter() - began < SECONDS
    return message


def mutated(recipe, key, value):
    part, _, name = key.partition(".")
    return {**recipe, part: {**recipe[part], name: value}}


def in_toml(value):
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf").replace('": ', '" = ')


@pytest.mark.parametrize("key", KEYS)
def test_a_recipe_with_another_value_is_read_or_refused_and_opened_or_refused(folder, tmp_path, key):
    """A UserError is one line, whichever of the two it comes from, and neither takes long."""
    recipe = dataclasses.asdict(recipe_in(folder))
    accepted = {}
    for name, value in VALUES.items():
        found = loaded(tmp_path / "recipe.json", mutated(recipe, key, value))
        if isinstance(found, str):
            assert key in found or "nested too deeply" in found, name
        else:
            accepted[name] = found
        if name in ("null", "deep"):  # TOML has the one not at all and the other not so deep, so they are plain text
            continue
        by_setting = loaded(tmp_path / "recipe.json", recipe, [f"{key}={in_toml(value)}"])
        assert isinstance(by_setting, str) or by_setting == found, name
    assert not {"nan", "infinity", "minus infinity", "digits", "huge", "deep", "object", "objects"} & set(accepted)
    for changed in list({repr(recipe): recipe for recipe in accepted.values()}.values()):
        message = opened(changed)
        assert message is None or "\n" not in message


@pytest.mark.parametrize("part", ["", *(field.name for field in dataclasses.fields(Recipe))])
def test_a_recipe_with_another_part_is_refused(folder, tmp_path, part):
    recipe = dataclasses.asdict(recipe_in(folder))
    for name, value in VALUES.items():
        found = loaded(tmp_path / "recipe.json", {**recipe, part: value} if part else value)
        if part not in ("", "model", "data", "run") and value == {}:  # they have a default for every key
            assert isinstance(found, Recipe)
        else:
            assert isinstance(found, str), name
    if part:
        assert part in loaded(tmp_path / "recipe.json", {**recipe, part: {**recipe[part], "another": 1}})


FILES = {
    "not UTF-8": b"[model]\nstart = '\xff'",
    "deep": b"a = " + b"[" * 10_000,
    "deep keys": b"[" + b".".join([b"a"] * 8_000) + b"]",
    "digits": b"[run]\nsteps = " + b"9" * 10_000,
    "hexadecimal digits": b"[model]\n[data]\n[run]\nsteps = 0x" + b"f" * 10_000,
    "date": b"[run]\nsteps = 1979-05-27",
    "large": b"#" * (2**14 + 1),
    "zeros": bytes(1000),
    "empty": b"",
}


@pytest.mark.parametrize("suffix", [".toml", ".json"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe(tmp_path, name, suffix):
    path = tmp_path / f"recipe{suffix}"
    path.write_bytes(FILES[name])
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert time.perf_counter() - began < SECONDS
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_recipe_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "fifo.toml")
    for path in (tmp_path / "fifo", tmp_path / "fifo.toml", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="expected a file"):
            load_recipe(path)


LINES = [
    b"null",
    b"5",
    b"{}",
    b"[]",
    b'"text"',
    b"",
    b"\xff\xfe{}",
    b'{"step": null}',
    b'{"step": "3"}',
    b'{"step": 3.0}',
    b'{"step": true}',
    b'{"step": NaN}',
    b'{"step": [1]}',
    b'{"step": 3, "lo',
    b"[" * 50_000,
    b'{"step": ' + b"9" * 10_000 + b"}",
    bytes(300),
]
METRICS = Metrics(jnp.float32(2.5), jnp.float32(1.5), *map(jnp.int32, (7, 100, 3, 0, 0)))


def written_log(folder, steps=6):
    with Progress(folder, 0, steps, recipe_in(folder)) as log:
        for number in range(1, steps + 1):
            log.step(number, METRICS, 1e9, 0.25, Counter(corrupt=1))
    return (folder / "log.jsonl").read_bytes().splitlines(keepends=True)


def kept_and_moved(folder, first=4):
    """The lines of a log that is resumed, and those that were set aside."""
    with Progress(folder, first, 6, recipe_in(folder)):
        pass
    aside = folder / "log.damaged.jsonl"
    moved = aside.read_bytes().splitlines(keepends=True) if aside.exists() else []
    aside.unlink(missing_ok=True)
    return (folder / "log.jsonl").read_bytes().splitlines(keepends=True), moved


def test_damaged_lines_of_a_log_are_set_aside(tmp_path, capsys):
    whole = written_log(tmp_path)
    capsys.readouterr()
    for at in (0, 2, 6):
        for damaged in LINES:
            (tmp_path / "log.jsonl").write_bytes(b"".join([*whole[:at], damaged + b"\n", *whole[at:]]))
            assert kept_and_moved(tmp_path) == (whole[:4], [damaged + b"\n"])
            assert capsys.readouterr().err == (
                f"warning: moved damaged lines of {tmp_path}/log.jsonl to log.damaged.jsonl in the same folder: 1\n"
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "tensorboard"]


def test_no_bit_of_a_log_stops_a_resume(tmp_path):
    """A flipped bit: what is still a line of a step is kept, everything else is set aside or came after the step."""
    whole = b"".join(written_log(tmp_path))
    rng = random.Random(0)
    for _ in range(400):
        at = rng.randrange(len(whole))
        log = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
        (tmp_path / "log.jsonl").write_bytes(log)
        kept, moved = kept_and_moved(tmp_path)
        assert all(read_line(line) for line in kept)
        assert not any(read_line(line) for line in moved)
        assert [line for line in log.splitlines(keepends=True) if line in kept] == kept
        lost = [read_line(line) for line in log.splitlines(keepends=True) if line not in [*kept, *moved]]
        assert all(line is None or line["step"] > 4 for line in lost)
        assert len(kept) + len(moved) >= 3
