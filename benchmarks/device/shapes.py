"""Shapes, batches and figures that our rows and torch's have in common."""

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np

from benchmarks.device.rows import DENSE
from benchmarks.inference import make_batch
from pdrop_jax.batch import IGNORE, Batch, Bucket
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.inputs.buckets import bucket_for
from pdrop_jax.schedule import DropSchedule

CAPACITY = 64  # cache slots for new tokens
TARGETS = 32  # the last text tokens of a training row, at most half of the text
STEPS = 3  # training steps in a row, as in a training loop: the host prepares one while the device runs another
GROUPS = ("projector", "llm")  # what LLaVA-1.5's second phase trains
LAYERS_STEP = 4  # numbers of layers are multiples of it, so that the drops are after a quarter, a half, three quarters


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is timed.

    Attributes:
      new_tokens: tokens that a decode loop makes, the first one by the prefill.
    """

    config: LlavaConfig
    bucket: Bucket
    new_tokens: int


def _released(config: LlavaConfig, tokens: int) -> Shape:
    """A released model, asked in 64 tokens about a picture of so many."""
    return Shape(config, bucket_for(64, (tokens,), config), new_tokens=33)


SHAPES = {
    "7b": _released(LlavaConfig.llava_1_5_7b(), 576),
    "qwen2.5-vl-7b": _released(LlavaConfig.qwen2_5_vl("7b"), 1024),
    "qwen3-vl-8b": _released(LlavaConfig.qwen3_vl("8b"), 1024),
    "gemma-3-12b": _released(LlavaConfig.gemma3("12b"), 256),
    "tiny": Shape(
        LlavaConfig(
            vision=VisionConfig(image_size=56, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2),
            text=TextConfig(
                vocab_size=256,
                hidden_size=32,
                intermediate_size=64,
                num_layers=4,
                num_heads=2,
                num_kv_heads=2,
                head_dim=16,
            ),
            image_aspect="pad",
            schedule=DropSchedule.none(),
        ),
        Bucket(16, (16,)),
        new_tokens=3,
    ),
}


def configure(shape: Shape, model: str, layers: int) -> LlavaConfig:
    """The shape's config with so many decoder layers; drops are at the quarters, as in the paper."""
    if model.startswith(DENSE):
        schedule = DropSchedule.none()
    elif shape.config.schedule.layers and layers == shape.config.text.num_layers:
        schedule = shape.config.schedule
    else:
        schedule = DropSchedule(tuple(layers * n // 4 for n in (1, 2, 3)), (0.5, 0.25, 0.125))
    return dataclasses.replace(
        shape.config, text=dataclasses.replace(shape.config.text, num_layers=layers), schedule=schedule
    )


def most_layers(shape: Shape, memory: float | None, need: Callable[[int], float]) -> int:
    """The largest number of layers, up to the shape's, that needs no more than ``memory`` bytes; None is no limit.

    Args:
      need: number of layers -> bytes.
    """
    layers = shape.config.text.num_layers
    while memory is not None and layers > LAYERS_STEP and need(layers) > memory:
        layers -= LAYERS_STEP
    return layers


def inference_layers(shape: Shape, memory: float | None) -> int:
    """Decoder layers whose bfloat16 weights fill at most three quarters of the memory; the rest is for the caches."""
    from pdrop_jax.model.params import abstract_params, count

    budget = None if memory is None else 0.75 * memory
    return most_layers(shape, budget, lambda layers: 2 * count(abstract_params(configure(shape, DENSE, layers))))


def training_batch(shape: Shape, rows: int) -> Batch:
    """``rows`` rows that fill the shape's bucket; the targets are their last tokens."""
    bucket = shape.bucket
    batch = make_batch(shape.config, bucket, rows)
    first = bucket.slots - targets(bucket)
    labels = np.where(np.arange(bucket.slots) >= first, batch.token_ids, IGNORE).astype(np.int32)
    return dataclasses.replace(batch, labels=labels, query_rows=np.full((rows, 1), first - 1, np.int32))


def targets(bucket: Bucket) -> int:
    return min(TARGETS, bucket.text // 2)


def reason(error: Exception) -> str:
    """One line: memory that ran out, or the first line of any other error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]


def shape_of(options: argparse.Namespace) -> Shape:
    return SHAPES[options.shape]
