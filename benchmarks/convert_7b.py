"""Memory and time of converting a checkpoint of LLaVA-1.5-7B's shape.

Writes a bfloat16 checkpoint of that shape, converts it, exports it again, and prints one JSON object. Memory is
anonymous memory (RssAnon), sampled every 5 ms, above what the process uses after its imports; pages of the mapped
source files do not count, because the operating system can reclaim them. Needs 45 GB of disk, removed at the end.

    python -m benchmarks.convert_7b --folder /tmp/convert_7b
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from pdrop_jax import checkpoint
from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.exporter import export
from pdrop_jax.convert.files import read_folder, write_safetensors
from pdrop_jax.convert.hf_config import hf_config, with_image_token
from pdrop_jax.convert.importer import convert
from pdrop_jax.convert.names import NAMINGS, torch_shapes, unrun_shapes
from pdrop_jax.schedule import DropSchedule

SHARD_BYTES = 2e9


def shape(layers: int, width: int, tower_layers: int) -> LlavaConfig:
    """LLaVA-1.5-7B, or a smaller model of its proportions."""
    config = LlavaConfig.llava_1_5_7b()
    heads = width // config.text.head_dim
    text = dataclasses.replace(
        config.text,
        num_layers=layers,
        hidden_size=width,
        intermediate_size=width * config.text.intermediate_size // config.text.hidden_size,
        num_heads=heads,
        num_kv_heads=heads,
    )
    vision = dataclasses.replace(config.vision, num_layers=tower_layers)
    return dataclasses.replace(config, text=text, vision=vision, schedule=DropSchedule.none())


def write_source(folder: pathlib.Path, config: LlavaConfig) -> int:
    """A checkpoint with Hugging Face's names and normal random numbers of standard deviation 0.02."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config, "bfloat16")))
    rng = np.random.default_rng(0)
    shapes = torch_shapes(config, NAMINGS["hf"]) | unrun_shapes(config, NAMINGS["hf"])
    shard: dict[str, np.ndarray] = {}
    weight_map: dict[str, str] = {}
    total = 0

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in shapes.items():
        shard[name] = (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        total += shard[name].nbytes
        if sum(x.nbytes for x in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def status(field: str) -> float:
    """The value of a line of /proc/self/status, in GB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


@contextlib.contextmanager
def measured(figures: dict[str, float]) -> Iterator[None]:
    """Records the seconds and the peak of anonymous memory, above its current value, in ``figures``."""
    before, peak, done = status("RssAnon"), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], status("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        figures["seconds"] = round(time.perf_counter() - start, 1)
        done.set()
        sampler.join()
        figures["peak_anonymous_gb"] = round(peak[0] - before, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="new folder for temporary files")
    parser.add_argument("--dense", action="store_true", help="no drop schedule: one stack of all layers")
    parser.add_argument("--layers", type=int, default=32, help="layers of the language model (fewer for a quick try)")
    parser.add_argument("--width", type=int, default=4096, help="width of the language model, whose heads have 128")
    parser.add_argument("--tower-layers", type=int, default=24, help="layers of the vision tower")
    parser.add_argument("--export", action="store_true", help="export again and compare every tensor bit by bit")
    args = parser.parse_args()
    config = with_image_token(shape(args.layers, args.width, args.tower_layers))
    quarters = tuple(args.layers * n // 4 for n in (1, 2, 3))
    schedule = DropSchedule.none() if args.dense else DropSchedule(quarters)
    try:
        source_bytes = write_source(args.folder / "source", config)
        figures: dict[str, object] = {"source_gb": round(source_bytes / 1e9, 2), "dense": args.dense}
        conversion: dict[str, float] = {}
        with measured(conversion):
            summary = convert(args.folder / "source", args.folder / "ours", schedule=schedule)
        largest = max(
            np.prod(x.shape) * 2 for x in checkpoint.abstract_arrays(args.folder / "ours", summary.config).values()
        )
        conversion["limit_gb"] = round((2 * largest + 2**30) / 1e9, 2)
        conversion["written_gb"] = round(summary.bytes / 1e9, 2)
        figures["convert"] = conversion
        if args.export:
            exported: dict[str, float] = {}
            with measured(exported):
                export(args.folder / "ours", args.folder / "again", "hf")
            source, again = read_folder(args.folder / "source"), read_folder(args.folder / "again")
            same = [
                np.array_equal(x.read().view(np.uint16), again[name].read().view(np.uint16))
                for name, x in source.items()
            ]
            exported["bit_exact"] = source.keys() == again.keys() and all(same)
            figures["export"] = exported
        print(json.dumps(figures))
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
