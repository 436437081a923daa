"""Pruning decided in float and then quantized, beside pruning decided under quantization, on the demo model or another.

All contenders answer the same questions about pictures of test photos with the same number of image tokens, averaged
over layers, and w4a4 with an int4 cache. "in float": the drops are allocated and the tokens are chosen by the float
model, and the quantized model keeps those. "joint": both under the quantized forward pass, as ``pdrop tune --quantize
w4a4`` does. Schedules are calibrated on other pictures. KL is of the first new token, dense float model || contender,
in nats. Intervals are 95 % bootstrap intervals over pictures; differences are paired by question.

    python -m benchmarks.quota                      # five or six questions about each of 200 pictures
    python -m benchmarks.quota --model MODEL --questions Q.jsonl --images DIR --calibration-pictures 32

Questions of one's own are those of ``pdrop study``, one picture each; lines with an "answer" tell what is right. The
first of them calibrate.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from examples.demo.evaluate import BATCH, NEW_TOKENS, Case, draw_cases
from pdrop_jax.analysis.budget import Budget
from pdrop_jax.analysis.effects import Mean, mean_of
from pdrop_jax.analysis.metrics import kl
from pdrop_jax.analysis.tune.allocation import allocate, candidate_layers, drop_shares, rescaled_sensitivity
from pdrop_jax.analysis.tune.calibrate import Sample, calibrate
from pdrop_jax.batch import Batch
from pdrop_jax.eval.questions import read_questions
from pdrop_jax.generation.engine import generate_batch, with_rows
from pdrop_jax.generation.pretrained import DEMO, Model, load, reschedule
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.images import open_image
from pdrop_jax.schedule import DropSchedule

QUANTIZED: dict[str, Any] = {"quantize": "w4a4", "quantize_cache": "int4"}
# Magnitude, attention of text, attention of image tokens, quantization residual.
WEIGHTS = {"no residual": (1, 1, 1, 0), "residual keeps": (1, 1, 1, 1), "residual drops": (1, 1, 1, -1)}
FLOAT = "quota, in float"  # what the differences are to


@dataclasses.dataclass(frozen=True)
class Flags:
    model: pathlib.Path = DEMO
    questions: pathlib.Path | None = None  # instead of the demo's
    images: pathlib.Path = pathlib.Path()
    pictures: int = 200  # of the demo's
    keep: float = 0.5
    calibration_pictures: int = 8
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Answers:
    """Of Q questions: probabilities (Q, V) of the first token, whether right (Q,), and kept tokens."""

    probs: np.ndarray
    right: np.ndarray
    kept: list[Any]


def main(flags: Flags) -> None:
    """Prints a table with a row for each contender."""
    exact, quantized = load(flags.model), load(flags.model, **QUANTIZED)
    first, cases = cases_of(flags)
    batches = batches_of(exact, cases)
    samples = [Sample(batch, rows) for batch, rows in batches_of(exact, first)]
    in_float, joint = (allocated(exact, model, samples, flags.keep) for model in (exact, quantized))

    dense = asked(reschedule(exact, DropSchedule.none()), batches, cases, "dense, float")
    found = {"dense, quantized": asked(reschedule(quantized, DropSchedule.none()), batches, cases, "dense, quantized")}
    for score, fields in {"pyramiddrop": {}, "quota": {"score": "quota", "weights": WEIGHTS["no residual"]}}.items():
        chosen = asked(reschedule(exact, dataclasses.replace(in_float, **fields)), batches, cases, f"{score}, float")
        kept = reschedule(quantized, dataclasses.replace(in_float, score="given"))
        found[f"{score}, in float"] = asked(kept, batches, cases, f"{score}, in float", chosen.kept)
    found["pyramiddrop, joint"] = asked(reschedule(quantized, joint), batches, cases, "pyramiddrop, joint")
    for name, weights in WEIGHTS.items():
        schedule = dataclasses.replace(joint, score="quota", weights=weights)
        found[f"quota, joint, {name}"] = asked(reschedule(quantized, schedule), batches, cases, f"quota, {name}")

    print_table(dense, found, [str(hash(case.picture.tobytes())) for case in cases])
    for name, schedule in (("in float", in_float), ("joint", joint)):
        kept = zip(schedule.layers, schedule.ratios, strict=True)
        print(f"\nAllocated {name}: {', '.join(f'{ratio:.1%} after {layer}' for layer, ratio in kept)}")


def cases_of(flags: Flags) -> tuple[list[Case], list[Case]]:
    """Questions to calibrate with, and those to compare."""
    if flags.questions is None:
        return draw_cases(flags.calibration_pictures, flags.seed + 1), draw_cases(flags.pictures, flags.seed)
    found = []
    for question in read_questions(flags.questions, flags.images):
        if len(question.images) != 1:
            raise SystemExit(f"{question.where} has {len(question.images)} pictures: the comparison takes one")
        picture = np.asarray(open_image(question.images[0]))
        found.append(Case("own", picture, [(question.text, None)], str(question.fields.get("answer", ""))))
    first = flags.calibration_pictures
    if len(found) < first + 2:
        raise SystemExit(f"{flags.questions} has {len(found)} questions, of which {first} calibrate: ask more")
    return found[:first], found[first:]


def batches_of(model: Model, cases: Sequence[Case]) -> list[tuple[Batch, int]]:
    """(batch, rows that are no padding), all of one size."""
    groups = [cases[start : start + BATCH] for start in range(0, len(cases), BATCH)]
    batches = [model.processor([case.turns for case in group], [case.picture for case in group]) for group in groups]
    size = min(BATCH, len(cases))
    return [(with_rows(batch, size), len(group)) for batch, group in zip(batches, groups, strict=True)]


def allocated(exact: Model, deployed: Model, samples: list[Sample], keep: float) -> DropSchedule:
    """The schedule of ``pdrop tune --keep`` for the deployed model."""
    measured = calibrate(exact, deployed, samples)
    layers = candidate_layers(measured.attention)
    shares = drop_shares(rescaled_sensitivity(measured.sensitivity)[list(layers)])
    budget = Budget("average tokens", keep * measured.image_tokens)
    schedule = DropSchedule(layers, (0.0,) * len(layers), exact.config.schedule.positions)
    return allocate(exact.config.text, schedule, shares, budget, measured.image_tokens)


def asked(
    model: Model,
    batches: Sequence[tuple[Batch, int]],
    cases: Sequence[Case],
    name: str,
    kept: Sequence[Any] | None = None,
) -> Answers:
    """The answers to all questions.

    Args:
      kept: [question][drop][image] -> the tokens to keep, for the score "given".
    """
    texts, probs, found = [], [], []
    for batch, rows in tqdm(batches, name, disable=None):
        if kept is not None:
            batch = dataclasses.replace(batch, scores=survivals(batch, kept[len(texts) : len(texts) + rows]))
        answer = generate_batch(model, batch, Sampling(NEW_TOKENS), rows=rows)
        texts += answer.texts
        found += answer.kept
        probs.append(np.asarray(jax.nn.softmax(answer.first_logits)))
    right = np.array([text == case.answer for text, case in zip(texts, cases, strict=True)], float)
    return Answers(np.concatenate(probs), right, found)


def survivals(batch: Batch, kept: Sequence[Any]) -> np.ndarray:
    """Scores (B, S): how many drops each image token survives."""
    scores = np.zeros(np.shape(batch.image_id), np.float32)
    for row, drops in enumerate(kept):
        (slots,) = np.nonzero(np.asarray(batch.image_id)[row] == 1)
        for (tokens,) in drops:
            scores[row, slots[tokens]] += 1
    return scores


def print_table(dense: Answers, found: dict[str, Answers], pictures: list[str]) -> None:
    def shown(mean: Mean, form: str) -> str:
        return f"{mean.value:{form}} ({mean.low:{form}} to {mean.high:{form}})"

    divergences = {name: kl(dense.probs, answers.probs) for name, answers in found.items()}
    rows = [
        ["contender", "KL to dense float", "right answers", "KL, difference", "right answers, difference"],
        ["---"] * 5,
        ["dense, float", "0", shown(mean_of(dense.right, pictures), ".1%"), "", ""],
    ]
    for name, answers in found.items():
        apart = ["", ""]
        if "joint" in name:
            apart = [
                shown(mean_of(divergences[name] - divergences[FLOAT], pictures), "+.4f"),
                shown(mean_of(answers.right - found[FLOAT].right, pictures), "+.1%"),
            ]
        rows.append(
            [
                name,
                shown(mean_of(divergences[name], pictures), ".4f"),
                shown(mean_of(answers.right, pictures), ".1%"),
                *apart,
            ]
        )
    print(f"{len(dense.right):,} questions; differences are to {FLOAT!r}\n")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
