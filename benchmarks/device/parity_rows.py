"""The recorded vectors, replayed with each attention implementation that the platform has."""

import argparse
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterator

import jax

from benchmarks.device.rows import Row
from benchmarks.device.shapes import reason
from benchmarks.device.source_tree import ROOT
from pdrop_jax.config import Implementation
from pdrop_jax.convert.importer import read
from pdrop_jax.convert.names import torch_arrays
from pdrop_jax.errors import UserError
from pdrop_jax.parity.replay import KINDS, Reference, check, kind_of

GOLDEN = ROOT / "tests/golden"
HOST_ONLY = ("image_preprocess", "prompts", "train_preprocess")  # kinds of cases that run no model
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {"gpu": ("cudnn",), "tpu": ("splash",)}
THREADS = 8  # cases at a time: replaying one is mostly compiling small programs


def parity(options: argparse.Namespace) -> Iterator[Row]:
    """One row for each implementation and dtype, with the largest differences of every case."""
    kinds = {path.stem: kind_of(path) for path in sorted(GOLDEN.glob("*.json"))}
    cases = options.cases or [name for name, kind in kinds.items() if kind in KINDS and kind not in HOST_ONLY]
    for implementation in options.attention or ("xla", "blocked", *IMPLEMENTATIONS.get(jax.default_backend(), ())):
        for dtype in ("float32", "bfloat16"):
            common = {"part": "parity", "implementation": implementation, "dtype": dtype}
            if implementation == "cudnn" and dtype == "float32":
                continue  # it has no float32
            reference = Reference(functools.partial(read, dtype=dtype), torch_arrays, implementation)
            # jax 0.11.2 crashed on an H100 when threads compiled cudnn's kernels at the same time.
            threads = 1 if implementation == "cudnn" else min(THREADS, os.cpu_count() or 1)
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                found = pool.map(functools.partial(_replay, reference=reference), cases)
            yield {**common, "cases": dict(zip(cases, found, strict=True))}


def _replay(case: str, reference: Reference) -> Row:
    """The fields of the ``Comparison`` that the case records, and whether it is within float32's tolerances."""
    try:
        (row,) = check(GOLDEN, reference, [case])
    except (RuntimeError, ValueError, NotImplementedError, UserError) as error:
        return {"error": reason(error)}
    return {name: x for name, x in dataclasses.asdict(row).items() if x is not None} | {"ok": row.ok}
