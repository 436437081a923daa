"""Prefill and decode, side by side: our dense model, ours with PyramidDrop, and transformers' torch LLaVA (sdpa).

Random weights in LLaVA-1.5's shape; every model has the same small vision tower with the true number of patches, so
that the language model dominates the time. The models take turns within each round, together with two probes of the
machine: a large matrix product (which limits prefill) and reading a large array (which limits decode). All figures are
medians over the rounds. The efficiency of the drop (prefill speed-up / MAC ratio) is printed first: of all the figures
it depends least on the machine.

    python -m benchmarks.inference                  # 24 layers, D=1024, 576 image + 64 text tokens, float32
    python -m benchmarks.inference --dtype bfloat16
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pdrop_jax.analysis.cost import prefill_macs
from pdrop_jax.batch import Batch, Bucket
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.convert.hf_parts import text_to_hf, vision_to_hf
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.generation.engine import decode, start
from pdrop_jax.generation.next_token import token_sampler
from pdrop_jax.generation.pretrained import arrange
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.anyres import ImageTokens, whole
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.images import as_tokens, load_image_processor
from pdrop_jax.model.decoder import positions_of
from pdrop_jax.model.drop import Boundary, drop, pyramiddrop_score
from pdrop_jax.model.params import init_params
from pdrop_jax.model.rope import rope_tables
from pdrop_jax.model.vlm import embed
from pdrop_jax.schedule import DropSchedule

GREEDY = token_sampler(Sampling())
NEVER = np.array([-1], np.int32)  # no stop token

Timed = tuple[float, float]  # seconds of the prefill, seconds a decoded token


@dataclasses.dataclass(frozen=True)
class Flags:
    layers: int = 24
    hidden: int = 1024
    mlp: int = 2752
    heads: int = 16
    vocabulary: int = 32000
    image_tokens: int = 576  # a square number
    text_tokens: int = 64
    batch: tuple[int, ...] = (1, 4)
    dtype: Literal["float32", "bfloat16"] = "float32"
    new_tokens: int = 16
    repeats: int = 5
    probe: int = 4096  # edge of the matrices that measure the machine's limits
    torch: bool = True
    json: bool = False

    def config(self) -> LlavaConfig:
        side = int(self.image_tokens**0.5)
        if side * side != self.image_tokens:
            raise SystemExit(f"--image-tokens {self.image_tokens} is no square number")
        return LlavaConfig(
            vision=VisionConfig(image_size=14 * side, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2),
            text=TextConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.mlp,
                num_layers=self.layers,
                num_heads=self.heads,
                num_kv_heads=self.heads,
                head_dim=self.hidden // self.heads,
            ),
            schedule=DropSchedule.none(),
        )


def main(flags: Flags) -> None:
    """Prints a table, or JSON."""
    dense = flags.config()
    quarters = tuple(flags.layers * n // 4 for n in (1, 2, 3))
    pyramid = dataclasses.replace(dense, schedule=DropSchedule(quarters, (0.5, 0.25, 0.125)))
    params = arrange(dense, init_params(dense, dtype=flags.dtype))
    torch_model = make_torch(dense, flags.dtype) if flags.torch else None
    bucket = Bucket(flags.text_tokens, (dense.image_tokens,))
    probe = Probe(flags.probe, flags.dtype)
    results = []
    for B in flags.batch:
        batch = make_batch(dense, bucket, B)
        contenders: dict[str, Callable[[], Timed]] = {
            "machine": probe.time,
            "ours, dense": lambda b=batch: time_ours(dense, params, b, flags.new_tokens),
            "ours, PyramidDrop": lambda b=batch: time_ours(pyramid, regroup(params, pyramid), b, flags.new_tokens),
        }
        if torch_model is not None:
            contenders["torch, dense"] = lambda b=batch: time_torch(torch_model, b, flags.new_tokens)
        seconds = take_turns(contenders, flags.repeats)
        gemm, stream = seconds.pop("machine")
        limits = {"gflops": 2 * probe.macs / gemm / 1e9, "gb_per_second": probe.bytes / stream / 1e9}
        ranking = time_drops(pyramid, regroup(params, pyramid), batch, 10 * flags.repeats)  # a few ms each
        dense_prefill, drop_prefill = seconds["ours, dense"][0], seconds["ours, PyramidDrop"][0]
        ratio = prefill_macs(dense, bucket).total / prefill_macs(pyramid, bucket).total
        rows = []
        for name, (prefill, token) in seconds.items():
            config = pyramid if "Pyramid" in name else dense
            gmacs = B * prefill_macs(config, bucket).total / 1e9
            gigabytes = decode_bytes(config, regroup(params, config), batch) / 1e9
            rows.append(
                {
                    "model": name,
                    "prefill_seconds": prefill,
                    "prefill_gmacs": gmacs,
                    "prefill_share": 2 * gmacs / prefill / limits["gflops"],
                    "decode_ms_per_token": 1e3 * token,
                    "decode_gb": gigabytes,
                    "decode_share": gigabytes / token / limits["gb_per_second"],
                }
            )
        drop_figures = {
            "efficiency": dense_prefill / drop_prefill / ratio,
            "speed_up": dense_prefill / drop_prefill,
            "mac_ratio": ratio,
            "drop_share": ranking / drop_prefill,
        }
        results.append({"batch": B, **drop_figures, "limits": limits, "models": rows})
    if flags.json:
        print(json.dumps({"machine": machine(), "flags": dataclasses.asdict(flags), "results": results}, indent=2))
    else:
        print_report(results, flags.dtype)


class Probe:
    """What the machine can do: a square matrix product, and reading an array that no cache holds.

    Attributes:
      macs: multiply-accumulates of the product.
      bytes: bytes read.
    """

    def __init__(self, edge: int, dtype: str) -> None:
        self.matrix = jnp.full((edge, edge), 0.5, dtype)
        self.array = jnp.full((16 * edge, edge), 0.5, dtype)
        self.macs = edge**3
        self.bytes = self.array.nbytes
        self.product = jax.jit(jnp.matmul)
        self.read = jax.jit(lambda x: x.max(1))

    def time(self) -> Timed:
        """Seconds of the product, and of reading the array."""
        began = time.perf_counter()
        jax.block_until_ready(self.product(self.matrix, self.matrix))
        multiplied = time.perf_counter()
        jax.block_until_ready(self.read(self.array))
        return multiplied - began, time.perf_counter() - multiplied


def decode_bytes(config: LlavaConfig, params: Any, batch: Batch) -> int:
    """Bytes that one decode step must read: the decoder's layers, the output head and the KV cache."""
    state, *_ = start.eval_shape(config, params, batch, jax.random.key(0), GREEDY, NEVER, capacity=64)
    weights = {name: tree for name, tree in params.items() if name in ("stages", "norm", "head")}
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((weights, state.model.caches)))


def make_batch(config: LlavaConfig, bucket: Bucket, B: int) -> Batch:
    """``B`` rows of random text and one random square picture each, which fill the bucket."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(B):
        ids = rng.integers(3, config.text.vocab_size - 1, bucket.text).tolist()
        rows.append(Row([*ids[:8], IMAGE_PLACEHOLDER, *ids[8:]], [picture(config, bucket.images[0], rng)]))
    return assemble(rows, config, bucket)


def picture(config: LlavaConfig, tokens: int, rng: np.random.Generator) -> ImageTokens:
    """A random square picture of so many image tokens."""
    vision = config.vision
    if not isinstance(vision, QwenVisionConfig):
        return whole(rng.standard_normal(vision.crop_shape, np.float32), config)
    side = math.isqrt(tokens) * vision.cell
    pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
    with tempfile.TemporaryDirectory() as nothing:  # the default settings of the family
        processor = load_image_processor(pathlib.Path(nothing), config)
    return as_tokens(Image.fromarray(pixels), processor, config)


def regroup(params: Any, config: LlavaConfig) -> Any:
    """Parameters of the dense model in the stages of ``config``; on a CPU the layers are shared, not copied."""
    (layers,) = params["stages"].values()
    ranges = enumerate(config.schedule.layer_ranges(config.text.num_layers))
    stages = {str(s): jax.tree.map(lambda x: x[a:b], layers, is_leaf=_is_list) for s, (a, b) in ranges}  # noqa: B023
    return {**params, "stages": stages}


def _is_list(x: Any) -> bool:
    return isinstance(x, list)


def time_ours(config: LlavaConfig, params: Any, batch: Batch, new_tokens: int) -> Timed:
    key = jax.random.key(0)
    began = time.perf_counter()
    state, *_ = jax.block_until_ready(start(config, params, batch, key, GREEDY, NEVER, capacity=64))
    prefilled = time.perf_counter()
    jax.block_until_ready(decode(config, params, state, np.int32(new_tokens), GREEDY, NEVER))
    return prefilled - began, (time.perf_counter() - prefilled) / (new_tokens - 1)


def time_drops(config: LlavaConfig, params: Any, batch: Batch, repeats: int) -> float:
    """Seconds of all stage boundaries: scoring, selection and compaction, on buffers of the true sizes."""
    plan = config.schedule.plan(config.text.num_layers, batch.bucket)
    buffer = jax.jit(embed, static_argnums=(0, 3))(config, params, batch, plan[0].slots)
    total = 0.0
    run = jax.jit(drop, static_argnums=(0, 2, 3))
    for s, stage in enumerate(plan[1:], 1):
        layers = params["stages"][str(s)]
        first = layers[0] if _is_list(layers) else jax.tree.map(lambda x: x[0], layers)
        rope = rope_tables(config.text, positions_of(config.schedule, buffer))
        at = Boundary(config, s - 1, buffer, rope, first)
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            after, _ = jax.block_until_ready(run(stage, at, pyramiddrop_score, max(batch.bucket.images)))
            times.append(time.perf_counter() - began)
        total += statistics.median(times[1:])
        buffer = after
    return total


def make_torch(config: LlavaConfig, dtype: str) -> Any:
    """transformers' model of the same shape, with its own random weights."""
    import torch
    from transformers import LlavaConfig as TorchConfig
    from transformers import LlavaForConditionalGeneration

    settings = TorchConfig(
        vision_config=vision_to_hf(config.vision),
        text_config=text_to_hf(config.text),
        image_token_index=config.text.vocab_size - 1,
    )
    settings._attn_implementation = "sdpa"
    torch.set_default_dtype(getattr(torch, dtype))
    model = LlavaForConditionalGeneration(settings).eval()
    torch.set_default_dtype(torch.float32)
    return model


def time_torch(model: Any, batch: Batch, new_tokens: int) -> Timed:
    import torch

    image_id = np.asarray(batch.image_id)
    ids = torch.tensor(np.where(image_id > 0, model.config.image_token_index, batch.token_ids))
    pixels = torch.tensor(np.asarray(batch.crops)[:, 0].transpose(0, 3, 1, 2)).to(model.dtype)
    with torch.inference_mode():
        began = time.perf_counter()
        out = model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        prefilled = time.perf_counter()
        for _ in range(new_tokens - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return prefilled - began, (time.perf_counter() - prefilled) / (new_tokens - 1)


def take_turns(contenders: dict[str, Callable[[], Timed]], repeats: int) -> dict[str, Timed]:
    """Median (prefill, token) seconds of each contender, after one warm-up round."""
    rounds = [{name: run() for name, run in contenders.items()} for _ in range(repeats + 1)][1:]
    return {
        name: (statistics.median(r[name][0] for r in rounds), statistics.median(r[name][1] for r in rounds))
        for name in contenders
    }


def machine() -> dict[str, Any]:
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    packages = ("jax", "jaxlib", "flax", "torch", "transformers")
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def print_report(results: list[dict[str, Any]], dtype: str) -> None:
    for row in results:
        print(
            f"Efficiency of the drop at batch {row['batch']}: {row['efficiency']:.3f} "
            f"({row['speed_up']:.2f}x faster prefill at a MAC ratio of {row['mac_ratio']:.2f}; "
            f"scoring and compaction take {row['drop_share']:.1%} of it)"
        )
    for row in results:
        limits = row["limits"]
        print(
            f"Limits of the machine during batch {row['batch']}: {limits['gflops']:.0f} GFLOP/s in a {dtype} matrix "
            f"product, {limits['gb_per_second']:.1f} GB/s read from memory"
        )
    print(", ".join(f"{name} {value}" for name, value in machine().items()) + "\n")
    print(
        "| batch | model | prefill s | GMACs | of the GEMM rate | decode ms/token | GB read | of the streaming rate |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in results:
        for model in row["models"]:
            cells = [row["batch"], model["model"], f"{model['prefill_seconds']:.3f}", f"{model['prefill_gmacs']:.1f}"]
            cells += [f"{model['prefill_share']:.0%}", f"{model['decode_ms_per_token']:.1f}"]
            cells += [f"{model['decode_gb']:.2f}", f"{model['decode_share']:.0%}"]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    import tyro  # not needed by the benchmarks that import this one

    main(tyro.cli(Flags, description=__doc__))
