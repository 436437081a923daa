"""A training step, side by side: ours dense, ours with PyramidDrop, and transformers' torch LLaVA (sdpa, AdamW).

Random weights of LLaVA-1.5's shape; a small vision tower with the true number of patches on every side, so that the
language model dominates the time. All parameters are trained in float32, without remat. Each contender runs in its own
process, so that peak memory is measured separately; they take turns, and medians are printed. Then the data pipeline is
timed alone: photos of 640 x 480 pixels, read, cropped and tokenized.

    python -m benchmarks.training                  # 24 layers, D=1024, 576 image + 64 text tokens
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.data import photo
from benchmarks.inference import Flags as Shape
from benchmarks.inference import machine, make_batch, make_torch
from examples.demo.dataset import record, write_conversations
from examples.demo.grids import QuestionAnswer
from examples.demo.model import preprocessor
from examples.demo.tokenizer import TEMPLATE, write_tokenizer
from pdrop_jax.analysis.cost import training_macs
from pdrop_jax.batch import IGNORE, Batch, Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.params import init_params
from pdrop_jax.model.stacking import unstack
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.data.pipeline import open_dataset, pipeline
from pdrop_jax.train.optimizer import make_optimizer
from pdrop_jax.train.recipe import DataRecipe, OptimizerRecipe
from pdrop_jax.train.step import init_state, train_step

GROUPS = ("vision", "projector", "llm")
TARGETS = 32  # the last text tokens
CONTENDERS = ("ours, dense", "ours, PyramidDrop", "torch, dense")


@dataclasses.dataclass(frozen=True)
class Flags:
    layers: int = 24
    hidden: int = 1024
    mlp: int = 2752
    heads: int = 16
    image_tokens: int = Shape.image_tokens  # a square number
    batch: int = 1
    steps: int = 3  # timed steps per process
    repeats: int = 3  # processes per contender
    pictures: int = 400  # for the data pipeline
    only: Literal["", "ours, dense", "ours, PyramidDrop", "torch, dense"] = ""  # one contender, in this process

    @property
    def shape(self) -> Shape:
        return Shape(
            layers=self.layers, hidden=self.hidden, mlp=self.mlp, heads=self.heads, image_tokens=self.image_tokens
        )

    def config(self, name: str) -> LlavaConfig:
        quarters = tuple(self.layers * n // 4 for n in (1, 2, 3))
        pyramid = DropSchedule(quarters, (0.5, 0.25, 0.125))
        return dataclasses.replace(self.shape.config(), schedule=pyramid if "Pyramid" in name else DropSchedule.none())

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.shape.text_tokens, (self.shape.image_tokens,))


def main(flags: Flags) -> None:
    """Prints two tables."""
    if flags.only:
        print(json.dumps(time_one(flags)))
        return
    seconds, memory = ({name: [] for name in CONTENDERS} for _ in range(2))
    for name in tqdm(CONTENDERS * flags.repeats, unit=" processes", disable=None):
        options = [f"--{key}={value}" for key, value in dataclasses.asdict(flags).items() if key != "only"]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.training", *options, f"--only={name}"],
            stdout=subprocess.PIPE,
            check=True,
        )
        result = json.loads(done.stdout)
        seconds[name].append(statistics.median(result["seconds"]))
        memory[name].append(result["peak_bytes"])
    print(", ".join(f"{name} {value}" for name, value in machine().items()) + "\n")
    macs = {name: training_macs(flags.config(name), flags.bucket, TARGETS, GROUPS) for name in CONTENDERS}
    print("| model | step s | GMACs | peak memory GB |\n|---|---|---|---|")
    for name in CONTENDERS:
        step, peak = statistics.median(seconds[name]), statistics.median(memory[name])
        print(f"| {name} | {step:.2f} | {flags.batch * macs[name] / 1e9:,.0f} | {peak / 1e9:.2f} |")
    dense, pyramid = (statistics.median(seconds[name]) for name in CONTENDERS[:2])
    print(f"\nspeed-up {dense / pyramid:.2f} of {macs[CONTENDERS[0]] / macs[CONTENDERS[1]]:.2f} in MACs\n")
    print("| pipeline | rows/s | times a PyramidDrop step's |\n|---|---|---|")
    for workers in (0, 2):
        rate = time_pipeline(flags, workers)
        print(f"| {workers or 'threads, no'} worker processes | {rate:.0f} | {rate * pyramid / flags.batch:.0f} |")


def time_one(flags: Flags) -> dict[str, Any]:
    config = flags.config(flags.only)
    batch = training_batch(flags.config("dense"), flags.bucket, flags.batch)
    step = torch_step(config, batch) if "torch" in flags.only else our_step(config, batch)
    seconds = []
    for _ in range(flags.steps + 1):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def training_batch(config: LlavaConfig, bucket: Bucket, B: int) -> Batch:
    batch = make_batch(config, bucket, B)
    slot = np.arange(bucket.slots)
    labels = np.where(slot >= bucket.slots - TARGETS, batch.token_ids, IGNORE).astype(np.int32)
    query_rows = np.full((B, 1), bucket.slots - TARGETS - 1, np.int32)
    return dataclasses.replace(batch, labels=labels, query_rows=query_rows)


def our_step(config: LlavaConfig, batch: Batch) -> Any:
    optimizer = make_optimizer(config, OptimizerRecipe(), 1000)
    params = init_params(config)
    if jax.default_backend() == "cpu":
        params = unstack(params)
    state = init_state(config, params, GROUPS, optimizer, jnp.float32)
    del params

    def step() -> None:
        nonlocal state
        state, metrics = train_step(config, optimizer, state, batch, dtype=jnp.float32, remat="none")
        jax.block_until_ready((state, metrics))

    return step


def torch_step(config: LlavaConfig, batch: Batch) -> Any:
    import torch

    model = make_torch(config, "float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    image_id = np.asarray(batch.image_id)
    ids = torch.tensor(np.where(image_id > 0, model.config.image_token_index, batch.token_ids))
    pixels = torch.tensor(np.asarray(batch.crops)[:, 0].transpose(0, 3, 1, 2))
    labels = torch.tensor(np.asarray(batch.labels), dtype=torch.long)

    def step() -> None:
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_pipeline(flags: Flags, workers: int) -> float:
    """Rows per second after the first batch."""
    config = dataclasses.replace(flags.shape.config(), template=TEMPLATE)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(config.vision)))
        rng = np.random.default_rng(0)
        records = []
        for number in range(flags.pictures):
            (folder / f"{number}.jpg").write_bytes(photo(rng))
            records.append(
                record(f"{number}.jpg", [QuestionAnswer("place", "What is in row 1, column 2?", "sandal")] * 3)
            )
        write_conversations(folder / "data.json", records)
        data = DataRecipe(str(folder / "data.json"), str(folder), template=TEMPLATE, max_length=1024)
        with contextlib.redirect_stderr(io.StringIO()):
            dataset = open_dataset(data, config, folder)
        B = 8
        batches = iter(pipeline(dataset, B, 0, flags.pictures // B, workers=workers))
        next(batches)
        began = time.perf_counter()
        rows = B * sum(1 for _ in batches)
        return rows / (time.perf_counter() - began)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
