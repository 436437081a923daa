"""Make questions for the demo model in LLaVA's format, as in examples/grids, with the answers as GQA annotations.

python -m examples.make_grid_questions FOLDER [PICTURES]

Each line also has what ``pdrop study`` uses: the expected answer and the question in other words.
"""

import json
import pathlib
import sys

import numpy as np
from PIL import Image

from examples.demo.grids import KINDS, draw_grid, first_question

PICTURES = 8


def reworded(question: str) -> str:
    """The same question in words that the demo model was not trained on."""
    if question.startswith("What is in"):
        return question.replace("What is in", "What is there in")
    return f"And {question[0].lower()}{question[1:]}"


def main(folder: pathlib.Path, pictures: int = PICTURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    questions, annotations = [], {}
    for number in range(pictures):
        grid = draw_grid("test", 0, number)
        Image.fromarray(grid.picture).save(folder / f"{number}.png", optimize=True)
        rng = np.random.default_rng([0, number, 1])
        for kind in KINDS:
            turn = first_question(kind, grid.labels, rng)
            if turn is None:  # no garment occurs exactly once
                continue
            name, structure = f"{number}-{kind}", "verify" if kind == "presence" else "query"
            questions.append(
                {
                    "question_id": name,
                    "image": f"{number}.png",
                    "text": turn.question,
                    "category": kind,
                    "answer": turn.answer,
                    "reworded": reworded(turn.question),
                }
            )
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
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))
