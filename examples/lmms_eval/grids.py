"""Functions of the lmms-eval task pdrop_grids."""

import json
import pathlib

from PIL import Image

FOLDER = pathlib.Path(__file__).parents[1] / "grids"
TRUTHS = {name: record["answer"] for name, record in json.loads((FOLDER / "annotations.json").read_text()).items()}


def picture(doc):
    return [Image.open(FOLDER / doc["image"]).convert("RGB")]


def truth(doc):
    return TRUTHS[doc["question_id"]]


def score(doc, results):
    return {"exact_match": float(results[0].lower() == truth(doc))}
