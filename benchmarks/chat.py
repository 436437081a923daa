"""Time to first token of later questions in a conversation: both modes of a session, and running everything again.

Random weights of LLaVA-1.5's shape with a small vision tower, one picture in the first question, drops after a quarter,
a half and three quarters of the layers. The contenders take turns within each round, and medians are printed.

    python -m benchmarks.chat     # 24 layers, D=1024, 576 image tokens, float32
"""

import dataclasses
import json
import pathlib
import statistics
from typing import Any

import numpy as np
import tyro

from benchmarks.inference import Flags as Shape
from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import Model, arrange
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model.params import init_params
from pdrop_jax.schedule import DropSchedule

TOKENIZER = pathlib.Path(__file__).parent.parent / "examples/tiny_tokenizer"
QUESTIONS = ("What is on the table?", "Who put it there?", "And why?")


@dataclasses.dataclass(frozen=True)
class Flags:
    layers: int = 24
    hidden: int = 1024
    mlp: int = 2752
    heads: int = 16
    image_tokens: int = 576  # a square number
    new_tokens: int = 8
    repeats: int = 5
    json: bool = False

    def model(self, **tower: int) -> Model:
        """Args:
        tower: fields of the vision tower's config.
        """
        shape = Shape(self.layers, self.hidden, self.mlp, self.heads, image_tokens=self.image_tokens).config()
        quarters = tuple(self.layers * n // 4 for n in (1, 2, 3))
        schedule = DropSchedule(quarters, (0.5, 0.25, 0.125))
        vision = dataclasses.replace(shape.crop_tower, **tower)
        config = dataclasses.replace(shape, vision=vision, schedule=schedule, template="mistral_instruct")
        params = arrange(config, init_params(config))
        return Model(config, params, Processor.load(TOKENIZER, config))


def main(flags: Flags) -> None:
    """Prints a table, or JSON."""
    model = flags.model()
    size = model.config.vision.image_size
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    rounds = [one_round(model, picture, flags.new_tokens) for _ in range(flags.repeats + 1)][1:]  # the first compiles
    results = [
        {
            "turn": turn + 1,
            "tokens": rounds[0]["rerank"][turn]["tokens"],
            **{name: statistics.median(r[name][turn]["seconds"] for r in rounds) for name in rounds[0]},
        }
        for turn in range(len(QUESTIONS))
    ]
    if flags.json:
        print(json.dumps({"flags": dataclasses.asdict(flags), "results": results}, indent=2))
        return
    print("| turn | tokens | keep | rerank | anew |")
    print("|---|---|---|---|---|")
    for row in results:
        print(f"| {row['turn']} | {row['tokens']} | " + " | ".join(f"{row[n]:.3f} s" for n in rounds[0]) + " |")


def one_round(model: Model, picture: np.ndarray, new_tokens: int) -> dict[str, list[dict[str, Any]]]:
    """For each contender and turn: the tokens of the conversation and the seconds to the first new token."""
    found: dict[str, list[dict[str, Any]]] = {"keep": [], "rerank": [], "anew": []}
    sessions = {"keep": Session(model, "keep"), "rerank": Session(model, "rerank")}
    for turn, question in enumerate(QUESTIONS):
        for name, session in sessions.items():
            answer = session.ask(question, None if turn else picture, Sampling(new_tokens))
            found[name].append({"tokens": answer.stage_lengths[0], "seconds": answer.prefill_seconds})
        turns = sessions["rerank"].turns
        whole = generate(model, [[*turns[:-1], (turns[-1][0], None)]], [picture], Sampling(1))
        found["anew"].append({"tokens": whole.stage_lengths[0][0], "seconds": whole.prefill_seconds})
    return found


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
