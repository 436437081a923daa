"""Compares ways to compress the demo model's vision tower: ``python -m examples.demo.compression OUT``.

The trained demo model is given each of the connectors and compressors below and trained on for a while, as
LLaVA-UHD v4 trains a pretrained tower with its compressor. All have a quarter of the image tokens in the end. The same
command resumes a comparison that was stopped.
"""

import dataclasses
import json
import pathlib
import statistics
from typing import Annotated

import tyro

from examples.demo.dataset import CONVERSATIONS, IMAGES, write_dataset
from pdrop_jax import checkpoint
from pdrop_jax.analysis.tower_cost import tower_macs
from pdrop_jax.batch import Bucket
from pdrop_jax.config import EarlyCompression, LlavaConfig
from pdrop_jax.errors import UserError, exit_on_error
from pdrop_jax.generation.pretrained import DEMO
from pdrop_jax.io import read_bytes
from pdrop_jax.model.compression import compressed_params, with_compression
from pdrop_jax.train.log_file import FILE, read_line
from pdrop_jax.train.loop import MODEL, train
from pdrop_jax.train.recipe import load_recipe

RECIPE = pathlib.Path(__file__).parent / "recipe.toml"
HELD_OUT = 256  # pictures whose loss is computed, drawn with another seed
# name -> compression, and the merge size behind the tower. The tower has layers 0, 1 and 2.
VARIANTS: dict[str, tuple[EarlyCompression | None, int]] = {
    "none, merged behind the tower": (None, 2),
    "average pool, k = 1": (EarlyCompression(1, "average"), 1),
    "random pixel-unshuffle MLP, k = 1": (EarlyCompression(1, "unshuffle"), 1),
    "window attention and reused MLP, k = 1": (EarlyCompression(1), 1),
    "window attention and reused MLP, k = 0": (EarlyCompression(0), 1),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """A trained variant. ``losses`` are those on the held-out pictures after half of the steps and after all."""

    name: str
    seed: int
    tower_macs: int
    losses: list[float]


def write_start(folder: pathlib.Path, name: str, seed: int) -> LlavaConfig:
    """Writes the untrained variant unless it exists. Returns its config."""
    plain = LlavaConfig.load(DEMO)
    config = with_compression(plain, *VARIANTS[name])
    if not folder.exists():
        _, params = checkpoint.load(DEMO, dtype="float32")
        checkpoint.save(folder, config, compressed_params(config, params, seed), companions=DEMO)
    return config


def compare(out: pathlib.Path, name: str, seed: int, steps: int) -> Result:
    """Trains a variant and measures it; a finished one is read from its folder."""
    place = out / f"{list(VARIANTS).index(name)}-{seed}"
    done = place / "result.json"
    if done.exists():
        return Result(**json.loads(done.read_text()))
    config = write_start(place / "start", name, seed)
    module = ["compressor"] if config.vision.early_compression else []
    groups = ["vision", *module, "projector", "llm"]
    settings = {
        "model.start": str(place / "start"),
        "model.groups": json.dumps(groups),
        "data.conversations": str(out / "data" / CONVERSATIONS),
        "data.images": str(out / "data" / IMAGES),
        "data.text_buckets": "[80]",  # one shape, so that one program is compiled
        "optimizer.learning_rate": "5e-4",
        "validation.conversations": str(out / "held-out" / CONVERSATIONS),
        "validation.images": str(out / "held-out" / IMAGES),
        "validation.every": str(max(steps // 2, 1)),
        "run.folder": str(place),
        "run.steps": str(steps),
        "run.seed": str(seed),
        "run.save_every": "50",
    }
    train(load_recipe(RECIPE, [f"{key}={value}" for key, value in settings.items()]))
    if not (place / MODEL).exists():
        raise UserError(f"the run in {place} was stopped: the same command resumes it")
    lines = [read_line(line) or {} for line in read_bytes(place / FILE).splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    macs = tower_macs(config, Bucket(0, (config.image_tokens,), 1)).vision
    result = Result(name, seed, macs, losses)
    done.write_text(json.dumps(dataclasses.asdict(result)))
    return result


def table(results: list[Result]) -> str:
    """A Markdown table with one row for each variant: means over seeds, and their range."""
    rows = [["", "tower MACs", "loss after half of the steps", "loss after all"], ["---"] * 4]
    for name in VARIANTS:
        ours = [x for x in results if x.name == name]
        losses = [_with_range([x.losses[n] for x in ours]) for n in (0, -1)]
        rows.append([name, f"{ours[0].tower_macs / 1e6:,.0f} M", *losses])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _with_range(values: list[float]) -> str:
    text = f"{statistics.mean(values):.4f}"
    return text if len(values) == 1 else f"{text} ({min(values):.4f} to {max(values):.4f})"


def run(
    out: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="OUT")],
    pictures: int = 4000,
    steps: int = 200,
    seeds: int = 1,
) -> None:
    """Train the demo model with each kind of compression and print a table.

    Args:
      out: Folder for the data, the runs and their results.
      pictures: Number of training pictures.
      steps: Optimizer steps of each run.
      seeds: Number of runs of each variant.
    """
    for name, count, seed in (("data", pictures, 0), ("held-out", HELD_OUT, 1)):
        if not (out / name).exists():
            write_dataset(out / name, count, seed)
    results = []
    for seed in range(seeds):
        for name in VARIANTS:
            results.append(compare(out, name, seed, steps))
            print(json.dumps(dataclasses.asdict(results[-1])), flush=True)
    print(f"\n{pictures:,} pictures, {steps:,} steps, {seeds} seed(s)\n\n{table(results)}")


if __name__ == "__main__":
    with exit_on_error():
        tyro.cli(run, prog="python -m examples.demo.compression")
