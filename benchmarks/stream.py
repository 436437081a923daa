"""Memory and time a frame of a session that watches a long stream, in the parts of its length, and of its answers.

The demo model watches its own pictures over and over and is asked at the end of each part. With a window and a bank of
fixed size every part takes the same memory, and each frame the same time.

    python -m benchmarks.stream     # 2,000 frames
"""

import dataclasses
import itertools
import json
import pathlib
import resource
import statistics
import sys
import time
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image

from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.pretrained import DEMO, load
from pdrop_jax.generation.sampling import Sampling

PICTURES = pathlib.Path(__file__).parent.parent / "examples/grids"
QUESTION = "What is in row 1?"


@dataclasses.dataclass(frozen=True)
class Flags:
    frames: int = 2000
    parts: int = 4
    model: pathlib.Path = DEMO
    mode: Literal["keep", "rerank"] = "keep"
    json: bool = False


def main(flags: Flags) -> None:
    """Prints a table, or JSON."""
    session = Session(load(flags.model), flags.mode)
    pictures = [np.asarray(Image.open(path)) for path in sorted(PICTURES.glob("*.png"))]
    source = itertools.cycle(pictures)
    session.watch([next(source)])  # both compile
    session.ask(QUESTION, sampling=Sampling(8))
    size = flags.frames // flags.parts
    rows = [part(session, source, size) for _ in range(flags.parts)]
    if flags.json:
        print(json.dumps({"flags": dataclasses.asdict(flags) | {"model": str(flags.model)}, "results": rows}, indent=2))
        return
    print("| frames | in focus, in the bank | cache | process | a frame, processor time | a frame | first token |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['frames']:,} | {row['window']}, {row['bank']} | {row['cache_mb']:.2f} MB "
            f"| {row['process_mb']:,.0f} MB | {1e3 * row['processor_seconds']:.1f} ms "
            f"| {1e3 * row['seconds']:.1f} ms | {1e3 * row['answer_seconds']:.1f} ms |"
        )


def part(session: Session, source: Any, frames: int) -> dict[str, Any]:
    """Watches ``frames`` frames one by one and asks once."""
    seconds, processor = [], time.process_time()
    for _ in range(frames):
        began = time.perf_counter()
        held = session.watch([next(source)])
        seconds.append(time.perf_counter() - began)
    processor = time.process_time() - processor
    answer = session.ask(QUESTION, sampling=Sampling(8))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {
        "frames": held.frames,
        "window": held.window,
        "bank": held.bank,
        "cache_mb": held.cache_bytes / 1e6,
        "process_mb": kilobytes / 1e3,
        "seconds": statistics.median(seconds),
        "processor_seconds": processor / frames,
        "answer_seconds": answer.prefill_seconds,
    }


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
