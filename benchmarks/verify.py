"""The cost of verifying checksums when a checkpoint is loaded.

Writes a bfloat16 checkpoint of LLaVA-1.5-7B's shape, with random numbers, and loads it with and without verifying
the checksums, in turn, each time in a new process and with its files dropped from the page cache. Prints one JSON
object: the seconds of each load, the ratio of the medians, the seconds of computing the checksums alone, and the rate
of reading the files sequentially. Needs 14 GB of disk, removed at the end, and 16 GB of memory.

    python -m benchmarks.verify --folder /tmp/verify
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from pdrop_jax import checkpoint
from pdrop_jax.checkpoint import storage
from pdrop_jax.config import LlavaConfig, config_of
from pdrop_jax.model.params import abstract_params, count

LOAD = """
import sys, time
import jax
from flax.traverse_util import flatten_dict
from pdrop_jax import checkpoint
from pdrop_jax.checkpoint.checksums import checksums
jax.numpy.zeros(1).block_until_ready()
began = time.perf_counter()
_, params = checkpoint.load(sys.argv[1], verify=sys.argv[2] == "True")
jax.block_until_ready(params)
loaded = time.perf_counter()
checksums(flatten_dict(params, sep="."))
print(loaded - began, time.perf_counter() - loaded)
"""


def write(folder: pathlib.Path, config: LlavaConfig) -> None:
    block = (np.random.default_rng(0).standard_normal(2**24, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, x in flatten_dict(abstract_params(config), sep=".").items():
            yield name, np.resize(block, x.shape)

    with checkpoint.new_folder(folder, 2 * count(abstract_params(config))) as new:
        storage.write(new, arrays())
        config.save(new)


def uncache(folder: pathlib.Path) -> int:
    """Drops the files in ``folder`` from the page cache; returns their size in bytes."""
    os.sync()  # dirty pages would stay in the cache and be written while the files are read
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            total += path.stat().st_size
    return total


def read_rate(folder: pathlib.Path) -> float:
    """GB/s of reading the files of ``folder`` sequentially."""
    total = uncache(folder)
    began = time.perf_counter()
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
    return total / 1e9 / (time.perf_counter() - began)


def measure(folder: pathlib.Path, repeats: int) -> dict[str, object]:
    seconds: dict[bool, list[float]] = {True: [], False: []}
    sums: list[float] = []
    for _ in range(repeats):
        for verify, found in seconds.items():
            uncache(folder)
            command = [sys.executable, "-c", LOAD, str(folder), str(verify)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            loading, summing = map(float, output.split())
            found.append(loading)
            sums.append(summing)
    medians = {verify: statistics.median(found) for verify, found in seconds.items()}
    return {
        "gb": round(uncache(folder) / 1e9, 3),
        "read_gb_per_s": round(read_rate(folder), 2),
        "verified_s": [round(x, 2) for x in seconds[True]],
        "unverified_s": [round(x, 2) for x in seconds[False]],
        "checksums_s": round(statistics.median(sums), 2),
        "ratio": round(medians[True] / medians[False], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="new folder for temporary files")
    parser.add_argument(
        "--model", default="llava-1.5-7b", help="model whose shape is used: a name, or the folder of a checkpoint"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    try:
        write(args.folder, config_of(args.model))
        print(json.dumps(measure(args.folder, args.repeats)))
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
