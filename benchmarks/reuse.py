"""Time to the first token of a second question about a picture, from engines with and without caches.

Random weights of LLaVA-1.5's shape with a vision tower of a sixteenth of the decoder's parameters, drops after a
quarter, a half and three quarters of the layers. Every round has a new picture, and the engines take turns in it. Times
count from ``submit``, reading the picture included; medians are printed.

    python -m benchmarks.reuse     # 24 layers, D=1024, 576 image tokens, float32
"""

import dataclasses
import json
import statistics
import time

import numpy as np
import tyro

from benchmarks import chat
from pdrop_jax.batch import Bucket
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.sampling import Sampling

QUESTIONS = ("What is on the table?", "Who put it there?")
ROOM = 2**28  # bytes of a cache, for seven prefixes
CACHES = {
    "no cache": {},
    "image cache": {"image_cache": ROOM},
    "image and prefix cache": {"image_cache": ROOM, "prefix_cache": ROOM},
}


def main(flags: chat.Flags) -> None:
    """Prints a table, or JSON."""
    tower = {
        "hidden_size": flags.hidden // 2,
        "intermediate_size": 2 * flags.hidden,
        "num_layers": flags.layers // 4 + 1,
    }
    model = flags.model(**tower, num_heads=flags.heads // 2)
    buckets = [Bucket(64, (flags.image_tokens,))]
    engines = {
        name: Engine(model, 1, max_new_tokens=1, buckets=buckets, prefill_rows=1, **caches)
        for name, caches in CACHES.items()
    }
    rng, size, found = np.random.default_rng(0), model.config.vision.image_size, []
    for engine in engines.values():
        engine.warm_up()
    for _ in range(flags.repeats + 1):
        picture = rng.integers(0, 256, (size, size, 3), np.uint8)
        found.append({name: [seconds(engine, text, picture) for text in QUESTIONS] for name, engine in engines.items()})
    for engine in engines.values():
        engine.close()
    medians = {name: [statistics.median(r[name][n] for r in found[1:]) for n in range(2)] for name in engines}
    if flags.json:
        print(json.dumps({"flags": dataclasses.asdict(flags), "results": medians}, indent=2))
        return
    print("| engine | first question | second question | to that without a cache |")
    print("|---|---|---|---|")
    for name, (first, second) in medians.items():
        print(f"| {name} | {first:.3f} s | {second:.3f} s | {second / medians['no cache'][1]:.2f} |")


def seconds(engine: Engine, question: str, picture: np.ndarray) -> float:
    """Until the first token, which is the only one."""
    begin = time.perf_counter()
    engine.submit(question, picture, Sampling(1)).result()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(tyro.cli(chat.Flags, description=__doc__))
