"""Parity and speed on a GPU or TPU, as Markdown and JSON.

Five parts, each in its own process, so that one that runs out of memory or crashes does not stop the others and no
framework holds memory that the next one needs; before them the limits of the device are measured, a bfloat16 matrix
product and a copy.

    inference  prefill and decode of LLaVA-1.5-7B's shape, random weights, bfloat16, dense and with the paper's drops
    serving    continuous batching (``pdrop_jax.Engine``) of the same shape, against fixed batches
    training   a step of the same shape, with as many decoder layers as fit into the device's memory
    torch      transformers' torch LLaVA (sdpa, dense), if torch sees the device
    parity     the recorded vectors of tests/golden with each attention implementation that the device has

It runs from a source tree, installed or not; what is missing is reported by the part that needs it. Files are written
anew after each row, so an interrupted run keeps what it has measured.

    python benchmarks/accelerator.py --markdown gpu.md --json gpu.json
    python benchmarks/accelerator.py --shape tiny --batches 1 --repeats 1      # a quick try, on a CPU too
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

# Run as a file, Python looks for modules in benchmarks/ instead of the root of the source tree.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.device.report import add_shares, markdown
from benchmarks.device.source_tree import make_importable
from pdrop_jax.io import check_outputs, write_file

PARTS = ("inference", "serving", "training", "torch", "parity")
# JAX would take three quarters of a GPU's memory, but no other process uses the device at the same time.
SHAPE_NAMES = (
    "7b",
    "qwen2.5-vl-7b",
    "qwen3-vl-8b",
    "gemma-3-12b",
    "tiny",
)  # of benchmarks.device.shapes, which needs jax
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94"}


def main() -> None:
    options = parse()
    if options.part:
        for row in run_part(options.part, options):
            print(json.dumps(row), flush=True)
        return
    check_outputs([(options.markdown, ()), (options.json, ())], overwrite=True)
    command = " ".join(["python benchmarks/accelerator.py", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    limits = None
    for part in ("limits", *options.parts):
        for row in run_part(part, options) if options.one_process else child(part, options):
            rows.append(add_shares(row, limits))
            if part == "limits" and "device" in row:
                limits, options.platform, options.memory = row, row["platform"], row["memory_bytes"]
            if part == "training" and "layers" in row:
                options.train_layers = row["layers"]
            write(rows, command, options)
    print(markdown(rows, command))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPE_NAMES, default="7b", help="7b is LLaVA-1.5-7B's")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each program")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--int8", action="store_true", help="inference: time int8 weights too")
    parser.add_argument("--slots", type=int, default=32, help="serving: requests that run at the same time")
    parser.add_argument("--cases", nargs="+", help="recorded vectors to replay (default: all that run the model)")
    parser.add_argument("--attention", nargs="+", help="implementations to replay them with (default: the platform's)")
    parser.add_argument("--markdown", type=pathlib.Path, help="file for the tables, which are printed too")
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
    parser.add_argument("--one-process", action="store_true", help="no process for each part: starts faster, for tests")
    # What a part's process is told.
    parser.add_argument("--part", choices=("limits", *PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--platform", help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)  # bytes of the device
    parser.add_argument("--train-layers", type=int, help=argparse.SUPPRESS)  # of the part "training"
    return parser.parse_args()


def child(part: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a part, run in its own process; a failure becomes a row with ``skipped``."""
    words = [sys.executable, __file__, "--part", part, "--shape", options.shape, "--repeats", str(options.repeats)]
    words += ["--batches", *map(str, options.batches)]
    words += ["--cases", *options.cases] if options.cases else []
    words += ["--attention", *options.attention] if options.attention else []
    words += ["--int8"] if options.int8 else []
    for name in ("slots", "platform", "memory", "train_layers"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    environment = ENVIRONMENT | dict(os.environ)
    if part == "torch":
        environment["JAX_PLATFORMS"] = "cpu"  # leaves the device's memory to torch
    print(f"{part} ...", file=sys.stderr, flush=True)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # something that a library prints
                row = json.loads(line)
                print(f"  {line.strip()[:160]}", file=sys.stderr, flush=True)
                yield row
    if process.returncode:
        yield {"part": part, "skipped": f"its process ended with exit code {process.returncode}, see its error output"}


def run_part(part: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a part, in this process."""
    make_importable()
    try:
        if part == "torch":
            from benchmarks.device.torch_llava import torch_rows as rows
        elif part == "parity":
            from benchmarks.device.parity_rows import parity as rows
        elif part == "limits":
            from benchmarks.device.limits import limits as rows
        elif part == "serving":
            from benchmarks.device.serving import serving as rows
        else:
            from benchmarks.device import ours

            rows = getattr(ours, part)
        yield from map(finite, rows(options))
    except ImportError as error:
        yield {"part": part, "skipped": f"the package {error.name} is missing ({error})"}


def finite(value: Any) -> Any:
    """``value`` with infinite numbers as null, which JSON has instead; arrays of other shapes differ infinitely."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(rows: list[dict[str, Any]], command: str, options: argparse.Namespace) -> None:
    if options.markdown:
        write_file(options.markdown, markdown(rows, command), overwrite=True)
    if options.json:
        write_file(options.json, json.dumps({"command": command, "rows": rows}, indent=2) + "\n", overwrite=True)


if __name__ == "__main__":
    main()
