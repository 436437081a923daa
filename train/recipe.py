"""A recipe: everything that a training run is told, as frozen dataclasses."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Data:
    """Conversations in LLaVA's JSON and the pictures that they speak of."""

    conversations: str  # JSON list or JSON lines
    images: str  # folder
    template: str = "vicuna_v1"
    max_length: int = 2048  # positions, images expanded
    too_long: Literal["cut", "skip"] = "cut"
    text_buckets: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)  # text slots of a batch
    group: bool = False  # batches of like modality and length
    broken: Literal["skip", "fail"] = "skip"
    workers: int = 0  # processes that read; 0 is threads


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and a cosine to zero. The defaults are LLaVA-1.5's finetuning."""

    learning_rate: float = 2e-5
    vision_learning_rate: float | None = None  # None is learning_rate
    projector_learning_rate: float | None = None
    warmup: float = 0.03  # share of all steps
    weight_decay: float = 0.0  # never of norms and biases
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0  # of the gradient of all groups together
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second is float32
