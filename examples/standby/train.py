"""``python -m examples.standby.train``: trains 16 standby tokens, and beside them two plain ways to show 16 tokens.

Each way begins as the demo model, is trained for as many steps on the same pictures, and answers the demo's questions
about test pictures. A row is a picture and its conversation, or with ``--frames`` a video and a question about a frame.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import tyro

from examples.demo.evaluate import Case, draw_cases
from examples.demo.grids import SIDE, converse, draw_grid
from examples.demo.photos import GARMENTS, Split
from examples.standby.ways import WAYS, Way, copied, demo, thawed
from pdrop_jax.batch import Batch
from pdrop_jax.errors import exit_on_error
from pdrop_jax.generation.engine import generate_batch
from pdrop_jax.generation.pretrained import DEMO, Model, arrange
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.chat_template import Turn
from pdrop_jax.inputs.messages import read_turns
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.train.optimizer import make_optimizer
from pdrop_jax.train.recipe import OptimizerRecipe
from pdrop_jax.train.step import init_state, join, train_step

ROWS = 16  # of a batch
NAMES = [garment.name for garment in GARMENTS]


@dataclasses.dataclass(frozen=True)
class Example:
    """Frames, and a conversation about them whose first question has their places."""

    frames: list[np.ndarray]
    turns: list[Turn]


def draw_picture(split: Split, seed: int, number: int) -> Example:
    """One picture with the demo's conversation about it."""
    grid = draw_grid(split, seed, number)
    turns = converse(grid.labels, np.random.default_rng([seed, number, 1]))
    return Example([grid.picture], [(turn.question, turn.answer) for turn in turns])


def draw_video(split: Split, seed: int, number: int, frames: int) -> Example:
    """As many grids, and one question: "What was in row 2, 8 frames ago?"."""
    grids = [draw_grid(split, seed, number * frames + n) for n in range(frames)]
    rng = np.random.default_rng([seed, number, 2])
    ago, row = int(rng.integers(frames)), int(rng.integers(SIDE))
    answer = ", ".join(NAMES[label] for label in grids[frames - 1 - ago].labels[row])
    return Example([grid.picture for grid in grids], [(f"What was in row {row + 1}, {ago} frames ago?", answer)])


def training_batch(way: Way, examples: Sequence[Example]) -> Batch:
    processor, rows = way.processor, []
    prompts = processor.prompts()
    for example in examples:
        shown = way.show(example.frames)
        (question, answer), *others = example.turns
        turns = [("<image>\n" * len(shown) + question, answer), *others]
        (found,) = prompts.tokenize([prompts.training_text(read_turns(turns))])
        rows.append(Row(found.ids, processor.all_tokens(shown), found.labels))
    return assemble(rows, way.config, choose_bucket(rows, way.config), queries=8)


def train(way: Way, examples: Iterator[list[Example]], steps: int, rate: float) -> tuple[Way, float]:
    """``way`` after ``steps`` steps, and the mean loss of the last tenth of them."""
    recipe = OptimizerRecipe(kind="muon", learning_rate=rate, b2=0.98, weight_decay=0.05)
    optimizer = make_optimizer(way.config, recipe, steps)
    state = init_state(way.config, copied(way.params), way.groups, optimizer, np.float32)
    losses = []
    for _ in range(steps):
        batch = training_batch(way, next(examples))
        state, metrics = train_step(way.config, optimizer, state, batch, dtype=np.float32, remat="none")
        losses.append(metrics.loss)
    params = join(state.trained, state.frozen)
    return dataclasses.replace(way, params=params), float(np.mean([float(x) for x in losses[-max(1, steps // 10) :]]))


def answers(way: Way, cases: Sequence[tuple[list[np.ndarray], list[Turn]]]) -> list[str]:
    model = Model(way.config, arrange(way.config, copied(way.params)), way.processor)
    found: list[str] = []
    for start in range(0, len(cases), 64):
        group = [*cases[start : start + 64]]
        filled = group + [group[-1]] * (64 - len(group))
        shown = [way.show(frames) for frames, _ in filled]
        batch = way.processor([turns for _, turns in filled], shown, max_new_tokens=16)
        found += generate_batch(model, batch, Sampling(16)).texts[: len(group)]
    return found


def accuracy(way: Way, pictures: int) -> dict[str, str]:
    """Right answers to each kind of question about test pictures."""
    cases: list[Case] = draw_cases(pictures)
    texts = answers(way, [([case.picture], case.turns) for case in cases])
    kinds = dict.fromkeys(case.kind for case in cases)
    right = {kind: [t == c.answer for t, c in zip(texts, cases, strict=True) if c.kind == kind] for kind in kinds}
    return {f"{kind}, {len(hits)} asked": f"{100 * np.mean(hits):.1f} %" for kind, hits in right.items()}


def video_accuracy(way: Way, videos: int, frames: int) -> dict[str, str]:
    """Garments named right at their place, by how many frames ago they were seen."""
    examples = [draw_video("test", 0, number, frames) for number in range(videos)]
    texts = answers(way, [(e.frames, [(e.turns[0][0], None)]) for e in examples])
    hits: dict[str, list[float]] = {"the newest two": [], "two to four ago": [], "longer ago": [], "all": []}
    for text, example in zip(texts, examples, strict=True):
        question, answer = example.turns[0]
        ago, wanted, said = int(question.split(", ")[1].split()[0]), str(answer).split(", "), text.split(", ")
        share = float(np.mean([a == b for a, b in zip(wanted, [*said, *[""] * 4], strict=False)]))
        for name in ("the newest two" if ago < 2 else "two to four ago" if ago < 5 else "longer ago", "all"):
            hits[name].append(share)
    return {f"{name}, {len(x)} asked": f"{100 * np.mean(x):.1f} %" for name, x in hits.items()}


def table(columns: dict[str, dict[str, str]]) -> str:
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    for name in next(iter(columns.values())):
        rows.append([name, *(column.get(name, "") for column in columns.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run(
    steps: int = 400,
    pictures: int = 100,
    frames: int = 1,
    rate: float = 2e-3,
    seed: int = 0,
    ways: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME …]")] = tuple(WAYS),
) -> None:
    """Train ways to show a picture by 16 tokens and print what each answers.

    Args:
      steps: Training steps of 16 rows.
      pictures: Test pictures, or videos.
      frames: Frames of a video; 1 is the demo's own task. With more, the language model is trained too.
      rate: Peak learning rate.
      seed: RNG seed for the training pictures.
      ways: What to train: "standby tokens", "average pool", "low resolution".
    """

    def drawn(number: int) -> Example:
        return draw_picture("train", seed, number) if frames == 1 else draw_video("train", seed, number, frames)

    def batches() -> Iterator[list[Example]]:
        start = 0
        while True:
            yield [drawn(start + n) for n in range(ROWS)]
            start += ROWS

    columns = {}
    for name in ways:
        way = WAYS[name]() if frames == 1 else thawed(WAYS[name](), "llm")
        began = time.perf_counter()
        way, loss = train(way, batches(), steps, rate)
        minutes = (time.perf_counter() - began) / 60
        found = accuracy(way, pictures) if frames == 1 else video_accuracy(way, pictures, frames)
        columns[name] = found | {"loss of the last tenth": f"{loss:.3f}", "minutes": f"{minutes:.1f}"}
        print(f"{name}: {columns[name]}", flush=True)
    if frames == 1:
        config, params = demo()
        whole = Way(config, params, Processor.load(DEMO, config), (), list)
        columns["all 144 tokens"] = accuracy(whole, pictures)
    print(table(columns))


if __name__ == "__main__":
    with exit_on_error():
        tyro.cli(run, prog="python -m examples.standby.train")
