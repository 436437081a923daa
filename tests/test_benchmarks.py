"""Every benchmark at a tiny size, to its last printed line: docs/benchmarks.md names these commands."""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from tiny_run import write_start

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SHAPE = ["--layers", "4", "--hidden", "32", "--mlp", "48", "--heads", "2", "--repeats", "1"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a benchmark in this process and returns what it prints."""

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        capsys.readouterr()
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        return capsys.readouterr().out

    return run


def run_as_shipped(name, *options):
    """The JSON objects that a benchmark prints, compiled with the settings of users rather than those of the tests."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_no_benchmark_is_forgotten():
    tests = pathlib.Path(__file__).read_text()
    for path in BENCHMARKS.glob("*.py"):
        assert f'("{path.stem}"' in tests, path.name


def test_inference(run):
    options = [*SHAPE, "--vocabulary", 300, "--image-tokens", 16, "--text-tokens", 16, "--new-tokens", 3]
    efficiency, limits, machine, _, columns, _, *rows = run(
        "inference", *options, "--batch", 1, "--probe", 64
    ).splitlines()
    assert re.fullmatch(
        r"Efficiency of the drop at batch 1: [\d.]+ \([\d.]+x faster prefill at a MAC ratio of 1\.\d\d; "
        r"scoring and compaction take [\d.]+% of it\)",
        efficiency,
    )
    assert re.search(r"\d+ GFLOP/s in a float32 matrix product, [\d.]+ GB/s read from memory$", limits)
    assert "cores" in machine
    assert columns.startswith("| batch | model | prefill s |")
    assert [row.split("|")[2].strip() for row in rows] == ["ours, dense", "ours, PyramidDrop", "torch, dense"]
    assert all(len(row.split("|")) == len(columns.split("|")) for row in rows)
    found = json.loads(run("inference", *options, "--batch", 1, 2, "--probe", 64, "--json", "--no-torch"))["results"]
    assert [row["batch"] for row in found] == [1, 2]
    assert all(row["efficiency"] == pytest.approx(row["speed_up"] / row["mac_ratio"]) for row in found)
    ours, pyramid = found[0]["models"]
    assert 0 < pyramid["decode_gb"] < ours["decode_gb"]  # the weights are the same, the cache is smaller


def test_training(run):
    out = run("training", *SHAPE, "--steps", 1, "--pictures", 24)
    assert "speed-up" in out
    assert out.splitlines()[-1].startswith("| 2 worker processes |")


def test_chat(run):
    _, _, *turns = run("chat", *SHAPE, "--image-tokens", 16, "--new-tokens", 2).splitlines()
    assert [turn.split("|")[1].strip() for turn in turns] == ["1", "2", "3"]


def test_quantized(run):
    rows = run("quantized", "--pictures", 1).splitlines()
    assert rows[0] == "|  | bfloat16 | int8 weights | float32 |"
    assert rows[-1].startswith("| the same image tokens in the last stage | 100.0% |")


def test_convert_7b(run, tmp_path):
    options = ["--layers", 4, "--width", 128, "--tower-layers", 2, "--export"]
    figures = json.loads(run("convert_7b", "--folder", tmp_path / "work", *options))
    assert figures["export"]["bit_exact"]
    assert not (tmp_path / "work").exists()


def test_plan_tables(run, tmp_path):
    model = write_start(tmp_path / "model")
    rows = run("plan_tables", "--models", model, "--chips", "v5e", "--slices", "2x2", "--rows", 4).splitlines()
    assert [row.split("|")[2].strip() for row in rows] == ["PyramidDrop", "dense"]
    assert all("of 15.75 GiB" in row for row in rows), rows


def test_verify(tmp_path):
    model = BENCHMARKS.parent / "pdrop_jax/demo"
    (found,) = run_as_shipped("verify", "--folder", tmp_path / "model", "--model", model, "--repeats", 1)
    assert found["gb"] > 0
    assert len(found["verified_s"]) == len(found["unverified_s"]) == 1
    assert not (tmp_path / "model").exists()


def test_batches():
    """A row in bfloat16 keeps the same tokens in a batch as alone."""
    options = ["--dtypes", "bfloat16", "--pictures", 2, "--batch-size", 8]
    (found,) = run_as_shipped("batches", *options)
    assert found["rows"] == 8
    assert found["kept_otherwise"] == found["answered_otherwise"] == 0
    assert max(found["largest_score_difference"]) < 1e-6
    (by_default,) = run_as_shipped("batches", *options, "--xla-default")
    assert max(by_default["largest_score_difference"]) > 1e-4  # what the compiler option is for
