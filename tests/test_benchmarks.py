"""Every benchmark at a tiny size, to its last printed line: docs/benchmarks.md names these commands."""

import dataclasses
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
import torch
from tiny_run import CONFIG as TINY
from tiny_run import write_start
from tiny_server import CONFIG, write_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from pdrop_jax.convert.importer import read
from pdrop_jax.schedule import DropSchedule

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
GRIDS = ROOT / "examples/grids"
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
    tests = pathlib.Path(__file__).read_text() + (ROOT / "tests/serve/test_soak.py").read_text()
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
    out = run("training", *SHAPE, "--image-tokens", 16, "--steps", 1, "--pictures", 16)
    assert "speed-up" in out
    assert out.splitlines()[-1].startswith("| 2 worker processes |")


def test_data(run):
    rows = run("data", "--pictures", 12, "--sample", 4, "--rounds", 2).splitlines()
    assert rows[0].endswith("2 rounds of 4 in one process")
    assert [row.split("|")[1].strip() for row in rows[4:10]] == [
        "decoding alone",
        "JSON and a folder",
        "Parquet",
        "WebDataset tar",
        "packed shards",
        "Parquet, in order",
    ]
    assert rows[5].endswith("| 1.00, 1.00 to 1.00 |")
    assert re.fullmatch(r"packing JSON and a folder: \d+ pictures per CPU second", rows[-1])


def test_chat(run):
    _, _, *turns = run("chat", *SHAPE, "--image-tokens", 16, "--new-tokens", 2).splitlines()
    assert [turn.split("|")[1].strip() for turn in turns] == ["1", "2", "3"]


def test_reuse(run):
    _, _, *rows = run("reuse", *SHAPE, "--image-tokens", 16).splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["no cache", "image cache", "image and prefix cache"]


def test_quantized(run, short_demo):
    rows = run("quantized", "--model", short_demo, "--pictures", 1).splitlines()
    assert rows[0] == "|  | bfloat16 | int8 weights | float32 |"
    assert rows[-1].startswith("| the same image tokens in the last stage | 100.0% |")


def test_quota(run, tmp_path):
    config = dataclasses.replace(
        CONFIG, text=dataclasses.replace(CONFIG.text, num_layers=5), schedule=DropSchedule.none()
    )
    model = write_model(tmp_path / "tiny", config)
    out = run("quota", "--model", model, "--pictures", 1, "--calibration-pictures", 1).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out if line.startswith("|")]
    names = [row[0] for row in rows[2:]]
    assert names[:4] == ["dense, float", "dense, quantized", "pyramiddrop, in float", "quota, in float"]
    assert names[4:] == [
        "pyramiddrop, joint",
        *(f"quota, joint, {x}" for x in ("no residual", "residual keeps", "residual drops")),
    ]
    number = r"[+-]?\d+\.\d+%?"
    interval = rf"{number} \({number} to {number}\)"
    assert all(re.fullmatch(interval, cell) for row in rows[6:] for cell in row[1:])
    assert out[-1].startswith("Allocated joint: ")


def test_quota_of_questions_of_ones_own():
    quota = runpy.run_module("benchmarks.quota")
    cases_of, Flags = quota["cases_of"], quota["Flags"]
    first, cases = cases_of(Flags(questions=GRIDS / "questions.jsonl", images=GRIDS, calibration_pictures=8))
    asked = [json.loads(line) for line in (GRIDS / "questions.jsonl").read_text().splitlines()]
    assert [case.turns for case in first + cases] == [[(question["text"], None)] for question in asked]
    assert [case.answer for case in cases] == [question["answer"] for question in asked[8:]]
    assert len(first) == 8
    with pytest.raises(SystemExit, match=f"has {len(asked)} questions, of which {len(asked)} calibrate"):
        cases_of(Flags(questions=GRIDS / "questions.jsonl", images=GRIDS, calibration_pictures=len(asked)))


def test_convert_7b(run, tmp_path):
    options = ["--layers", 4, "--width", 128, "--tower-layers", 2, "--export"]
    figures = json.loads(run("convert_7b", "--folder", tmp_path / "work", *options))
    assert figures["export"]["bit_exact"]
    assert not (tmp_path / "work").exists()


def test_plan_tables(run, tmp_path):
    # The TPU compiler takes its time for each stage.
    text = dataclasses.replace(TINY.text, num_layers=2)
    config = dataclasses.replace(TINY, text=text, schedule=DropSchedule((1,), (0.5,)))
    model = write_start(tmp_path / "model", config)
    rows = run("plan_tables", "--models", model, "--chips", "v5e", "--slices", "2x2", "--rows", 4).splitlines()
    assert [row.split("|")[2].strip() for row in rows] == ["PyramidDrop", "dense"]
    assert all(row.split("|")[5].strip() == "1" and " GiB | " in row and " ms | " in row for row in rows), rows


def test_verify(tmp_path):
    model = BENCHMARKS.parent / "pdrop_jax/demo"
    (found,) = run_as_shipped("verify", "--folder", tmp_path / "model", "--model", model, "--repeats", 1)
    assert found["gb"] > 0
    assert len(found["verified_s"]) == len(found["unverified_s"]) == 1
    assert not (tmp_path / "model").exists()


def test_batches(short_demo):
    """A row in bfloat16 keeps the same tokens in a batch as alone."""
    options = ["--dtypes", "bfloat16", "--pictures", 2, "--batch-size", 8, "--xla-default"]
    found, by_default = run_as_shipped("batches", "--model", short_demo, *options)
    assert (found["xla_default"], by_default["xla_default"]) == (False, True)
    assert found["rows"] == 8
    assert found["kept_otherwise"] == found["answered_otherwise"] == 0
    assert max(found["largest_score_difference"]) < 1e-6
    assert max(by_default["largest_score_difference"]) > 1e-4  # what the compiler option is for


@pytest.fixture
def run_uninstalled(tmp_path):
    """Runs a benchmark as a file, with pdrop-jax not installed and without packages that only other commands need."""
    missing = ("tyro", "grain", "qwix")
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
    )

    def run(name, *options):
        files = tmp_path / "tables.md", tmp_path / "figures.json"
        sizes = ["--shape", "tiny", "--batches", "1", "--repeats", "1"]
        command = [sys.executable, BENCHMARKS / f"{name}.py", *sizes, *options]
        command += ["--markdown", files[0], "--json", files[1]]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = json.loads(files[1].read_text())["rows"]
        assert files[0].read_text() in done.stdout
        assert not [row for row in rows if "error" in row or "skipped" in row]
        for row in rows:
            if row["part"] not in ("limits", "serving", "parity"):
                assert all(row[name] > 0 for name in ("flops_per_second", "flops_share", "bytes_share"))
        return rows, files[0].read_text()

    return run


def test_accelerator(run_uninstalled):
    parts = ["inference", "serving", "training", "torch", "parity"]
    (limits, *rows), tables = run_uninstalled(
        "accelerator", "--one-process", "--slots", "2", "--parts", *parts, "--cases", "prefill_single"
    )
    assert (limits["part"], limits["platform"]) == ("limits", "cpu")
    assert limits["flops_per_second"]["median"] > 0
    assert limits["bytes_per_second"]["median"] > 0

    programs = ("prefill", "decode", "train step")
    ours = {(row["program"], row["model"]): row for row in rows if row["part"] in ("inference", "training")}
    assert set(ours) == {(program, model) for program in programs for model in ("dense", "PyramidDrop")}
    for program in programs:
        dense, drops = ours[program, "dense"], ours[program, "PyramidDrop"]
        assert drops["flops"] < dense["flops"]
        assert dense["compile_seconds"] > 0
        assert dense["layers"] == 4
    assert {row["program"] for row in rows if row["part"] == "torch"} == set(programs)

    dense, drops, more = (row for row in rows if row["part"] == "serving")
    assert (dense["slots"], drops["slots"], dense["requests"]) == (2, 2, 8)
    assert drops["cache_bytes"] < dense["cache_bytes"]
    assert dense["cache_bytes"] * drops["slots"] // drops["cache_bytes"] == more["slots"]
    assert dense["new_tokens"] == drops["new_tokens"] == more["new_tokens"]
    assert all(row["serving_seconds"]["median"] > 0 for row in (dense, drops, more))

    parity = {(row["implementation"], row["dtype"]): row["cases"]["prefill_single"] for row in rows if "cases" in row}
    assert set(parity) == {(name, dtype) for name in ("xla", "blocked") for dtype in ("float32", "bfloat16")}
    for (_, dtype), case in parity.items():
        assert case["ok"] == (dtype == "float32"), case
        assert 0 < case["logits"] < 1
    assert "| xla | float32 |" in tables


def test_accelerator_reports_a_part_that_fails(run_uninstalled, tmp_path):
    """Each part is its own process; what is missing is reported by the part that needs it."""
    (tmp_path / "optax.py").write_text("raise ImportError('not here', name='optax')")
    with pytest.raises(AssertionError, match="the package optax is missing"):
        run_uninstalled("accelerator", "--parts", "training")


def test_stream(run, short_demo):
    """Memory and tokens are those of the first part that fills window and bank."""
    found = json.loads(run("stream", "--model", short_demo, "--frames", 30, "--parts", 2, "--json"))["results"]
    assert [row["frames"] for row in found] == [16, 31]
    assert {(row["window"], row["cache_mb"]) for row in found} == {(1, found[0]["cache_mb"])}


def test_random_tower(run, tmp_path):
    """The language model computes what it did, and the checkpoint converts."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    language = LlamaForCausalLM(LlamaConfig(vocab_size=320, tie_word_embeddings=True, **sizes)).eval()
    language.save_pretrained(tmp_path / "language")
    AutoTokenizer.from_pretrained(ROOT / "examples/tiny_tokenizer").save_pretrained(tmp_path / "language")
    run("random_tower", tmp_path / "language", tmp_path / "llava", "--hidden", 64, "--layers", 2)
    ids = torch.arange(20)[None]
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    with torch.no_grad():
        torch.testing.assert_close(llava(input_ids=ids).logits[..., :320], language(ids).logits)
    config, _ = read(str(tmp_path / "llava"))
    assert (config.image_tokens, config.text.num_layers) == (576, 4)


def test_serving(run, tmp_path):
    options = ["--requests", 2, "--clients", 2, "--new-tokens", 4, "--slots", 1, "--json"]
    rows = [*map(json.loads, run("serving", "--model", write_model(tmp_path / "tiny"), *options).splitlines())]
    servers = ["pdrop serve, PyramidDrop", "pdrop serve, dense", "FastAPI and transformers, dense"]
    assert [(row["server"], row["clients"]) for row in rows] == [(server, 2) for server in servers]
    assert all(0 < row["first_token_ms"] <= row["first_token_ms_95"] for row in rows)
    assert all(row["requests_per_second"] > 0 and row["token_ms"] > 0 for row in rows)
