"""Replays every recorded case of the official code, and checks that errors are detected."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from pdrop_jax.convert.importer import read
from pdrop_jax.convert.names import torch_arrays
from pdrop_jax.errors import UserError
from pdrop_jax.parity.replay import Reference, check
from pdrop_jax.parity.report import Comparison, error

REFERENCE = Reference(read, torch_arrays)
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = {
    "prefill_single": {"hidden", "scores", "logits", "kept"},
    "prefill_batch_ragged": {"hidden", "scores", "logits", "kept"},
    "decode_greedy": {"scores", "logits", "kept", "tokens"},
    "decode_text_only": {"logits", "tokens"},
    "gqa_prefill_single": {"hidden", "scores", "logits", "kept"},
    "gqa_decode_greedy": {"scores", "logits", "kept", "tokens"},
    "schedules": {"scores", "logits", "kept", "tokens"},
    "vanilla": {"hidden", "logits", "tokens"},
    "anyres_prefill": {"hidden", "scores", "logits", "kept"},
    "anyres_train": {"loss", "gradients", "scores", "kept"},
    "image_preprocess": {"pixels", "tokens"},
    "prompts": {"text"},
    "train_single_turn": {"loss", "gradients", "scores", "kept"},
    "train_multi_turn": {"loss", "gradients", "scores", "kept"},
    "train_plain_pretrain": {"loss", "gradients", "scores", "kept"},
    "preprocess_masks": {"tokens", "labels"},
}
# Each schedule compiles programs of its own, and the other programs are like the remaining ones. Optimised, these cases
# would take longer than all others together.
UNOPTIMISED = [
    *("schedules", "prefill_single", "gqa_prefill_single"),
    *("anyres_train", "train_single_turn", "train_plain_pretrain"),
]
SHIPPED = [name for name in CASES if name not in UNOPTIMISED]


def check_rows(rows, names):
    figures = {field.name for field in dataclasses.fields(Comparison)} - {"case"}
    found = {row.case: {name for name in figures if getattr(row, name) is not None} for row in rows}
    assert found == {name: CASES[name] for name in names}
    assert not [row for row in rows if not row.ok]


def test_cases_by_programs_of_the_tests():
    check_rows(check(GOLDEN, REFERENCE, UNOPTIMISED), UNOPTIMISED)


def test_cases_by_programs_as_shipped():
    """In a separate process, because the tests compile without optimisation."""
    code = f"""
import dataclasses, json, pathlib
from pdrop_jax.parity.replay import Reference, check
from pdrop_jax.convert.importer import read
from pdrop_jax.convert.names import torch_arrays
rows = check(pathlib.Path({str(GOLDEN)!r}), Reference(read, torch_arrays), {SHIPPED})
print(json.dumps([dataclasses.asdict(row) for row in rows]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_rows([Comparison(**row) for row in json.loads(done.stdout.splitlines()[-1])], SHIPPED)


def test_a_shift_beyond_the_tolerance_fails():
    assert Comparison("x", logits=9e-5, kept=True).ok
    assert not Comparison("x", logits=1.1e-4, kept=True).ok
    assert not Comparison("x", logits=9e-5, kept=False).ok
    assert not Comparison("x", scores=float("nan")).ok
    assert not Comparison("x").ok


def test_the_worst_figure_counts():
    row = Comparison.worst("x", [{"logits": 1.0, "kept": True}, {"logits": 2.0, "kept": False}, {"scores": 0.5}])
    assert row == Comparison("x", logits=2.0, kept=False, scores=0.5)


def test_nothing_is_compared_by_broadcasting():
    assert error(np.zeros(1), np.zeros((3, 1))) == float("inf")
    assert error(np.array([np.nan]), np.zeros(1)) == float("inf")


def test_a_folder_without_vectors(tmp_path):
    with pytest.raises(UserError, match="no reference vectors"):
        check(tmp_path, REFERENCE)


def test_an_unknown_case():
    with pytest.raises(UserError, match="no case prefil"):
        check(GOLDEN, REFERENCE, ["prefil"])
