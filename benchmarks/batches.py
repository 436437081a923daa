"""Does a row keep the same image tokens in a batch as alone?

Asks a model (the demo by default) questions about test pictures in batches of 1 and of --batch-size and prints one JSON
object per dtype: how many rows keep other tokens, how many get another answer, the largest difference of a score at
each drop, and the seconds to the first token of a batch and of a row. --xla-default compares a second time, compiled
with XLA's default, which skips rounding to bfloat16 inside fusions.

    python -m benchmarks.batches
"""

# ruff: noqa: E402  nothing here needs torch, with which transformers takes seconds longer to import

import argparse
import json
import pathlib
import statistics
from collections.abc import Sequence

import jax
import numpy as np

from pdrop_jax.without_torch import want_no_torch

want_no_torch()

from examples.demo.evaluate import Case, draw_cases
from pdrop_jax.generation import engine
from pdrop_jax.generation.pretrained import DEMO, Model, load
from pdrop_jax.generation.sampling import Sampling

NEW_TOKENS = 16


def ask(model: Model, cases: Sequence[Case]) -> engine.Generation:
    batch = model.processor([x.turns for x in cases], [x.picture for x in cases], max_new_tokens=NEW_TOKENS)
    return engine.generate_batch(model, batch, Sampling(NEW_TOKENS))


def compare(model: Model, cases: Sequence[Case], batch_size: int) -> dict[str, object]:
    kept = answers = 0
    scores: list[list[float]] = []
    seconds: dict[str, list[float]] = {"batch": [], "row": []}
    rows = len(cases) // batch_size * batch_size
    for start in range(0, rows, batch_size):
        group = cases[start : start + batch_size]
        together = ask(model, group)
        seconds["batch"].append(together.prefill_seconds)
        for n, case in enumerate(group):
            alone = ask(model, [case])
            seconds["row"].append(alone.prefill_seconds)
            kept += alone.kept[0] != together.kept[n]
            answers += alone.texts[0] != together.texts[n]
            pairs = zip(alone.scores[0], together.scores[n], strict=True)
            scores.append([max(float(np.nanmax(np.abs(x - y))) for x, y in zip(*pair, strict=True)) for pair in pairs])
    return {
        "rows": rows,
        "kept_otherwise": kept,
        "answered_otherwise": answers,
        "largest_score_difference": [float(f"{x:.2g}") for x in np.max(scores, axis=0)],
        "prefill_seconds": {name: round(statistics.median(found), 4) for name, found in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=pathlib.Path, default=DEMO)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--xla-default", action="store_true", help="compare with XLA's default too")
    args = parser.parse_args()
    static = ("config", "capacity", "implementation")
    starts = {False: engine.start}
    if args.xla_default:
        starts[True] = jax.jit(engine.start.__wrapped__, static_argnames=static)
    cases = draw_cases(args.pictures)
    for dtype in args.dtypes:
        model = load(args.model, dtype=dtype)
        for xla_default, start in starts.items():
            engine.start = start
            found = compare(model, cases, args.batch_size)
            print(json.dumps({"dtype": dtype, "xla_default": xla_default, "batch_size": args.batch_size, **found}))
        jax.clear_caches()


if __name__ == "__main__":
    main()
