"""Make examples/grids: questions to the demo model in LLaVA's format, and their answers as GQA's annotations.

python examples/make_grid_questions.py [FOLDER]
"""

import json
import pathlib
import sys

import numpy as np
from PIL import Image

from pdrop_jax.train.demo.grids import KINDS, draw_grid, first_question

PICTURES = 8


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    questions, annotations = [], {}
    for number in range(PICTURES):
        grid = draw_grid("test", 0, number)
        Image.fromarray(grid.picture).save(folder / f"{number}.png", optimize=True)
        rng = np.random.default_rng([0, number, 1])
        for kind in KINDS:
            turn = first_question(kind, grid.labels, rng)
            if turn is None:  # no garment stands in just one row
                continue
            name, structure = f"{number}-{kind}", "verify" if kind == "presence" else "query"
            questions.append({"question_id": name, "image": f"{number}.png", "text": turn.question, "category": kind})
            annotations[name] = {
                "question": turn.question,
                "answer": turn.answer.lower(),
                "isBalanced": True,
                "types": {"structural": structure},
            }
    lines = [json.dumps(question) + "\n" for question in questions]
    (folder / "questions.jsonl").write_text("".join(lines))
    (folder / "annotations.json").write_text(json.dumps(annotations, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "grids")
