"""Benchmarks whose figures the documentation states, run at a small size."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
DEMO = ROOT / "pdrop_jax/demo"


def run(name, *arguments):
    """The JSON objects that a benchmark prints; compiled as users compile, not as tests do."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_verifying_is_measured(tmp_path):
    (found,) = run("verify.py", "--folder", tmp_path / "model", "--model", DEMO, "--repeats", 1)
    assert found["gb"] > 0
    assert len(found["verified_s"]) == len(found["unverified_s"]) == 1
    assert not (tmp_path / "model").exists()


def test_a_bfloat16_row_keeps_the_same_tokens_in_a_batch_as_alone():
    options = ["--dtypes", "bfloat16", "--pictures", 2, "--batch-size", 8]
    (found,) = run("batches.py", *options)
    assert found["rows"] == 8
    assert found["kept_otherwise"] == found["answered_otherwise"] == 0
    assert max(found["largest_score_difference"]) < 1e-6
    (by_default,) = run("batches.py", *options, "--xla-default")
    assert max(by_default["largest_score_difference"]) > 1e-4  # what the compiler option is for
