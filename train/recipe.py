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
