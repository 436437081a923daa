"""A data set in LLaVA's format: conversations.json, and images/ beside it."""

import json
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.demo.grids import QuestionAnswer, check_drawing, converse, draw_grid
from pdrop_jax.checkpoint import new_folder

CONVERSATIONS = "conversations.json"
IMAGES = "images"
BYTES = 9_000  # bytes of a picture and its conversation, approximately


def write_dataset(folder: str | os.PathLike, pictures: int, seed: int = 0) -> None:
    """Writes ``pictures`` grids of training photos, each with a conversation. ``folder`` appears once it is complete.

    Picture n does not depend on ``pictures``.

    Raises:
      UserError: ``folder`` exists, ``pictures`` or ``seed`` is out of range, or the disk is too small.
    """
    check_drawing(pictures, seed)
    records = []
    with new_folder(folder, pictures * BYTES) as new:
        (new / IMAGES).mkdir()
        for number in tqdm(range(pictures), desc="drawing", unit=" pictures", disable=None):
            grid = draw_grid("train", seed, number)
            name = f"{number:06}.png"
            # Greyscale takes a third of the bytes; readers convert it to RGB.
            Image.fromarray(grid.picture).save(new / IMAGES / name, compress_level=1)
            turns = converse(grid.labels, np.random.default_rng([seed, number, 1]))
            records.append(record(name, turns))
        write_conversations(new / CONVERSATIONS, records)


def record(image: str, turns: list[QuestionAnswer]) -> dict[str, Any]:
    """A conversation about the picture ``image`` in LLaVA's format."""
    values = []
    for number, turn in enumerate(turns):
        values.append({"from": "human", "value": turn.question if number else f"<image>\n{turn.question}"})
        values.append({"from": "gpt", "value": turn.answer})
    return {"id": pathlib.PurePath(image).stem, "image": image, "conversations": values}


def write_conversations(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """A JSON list with one record per line, which is easy to read."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
