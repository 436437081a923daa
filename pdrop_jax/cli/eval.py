"""``pdrop eval``: answer a file of questions."""

import dataclasses
import json
import pathlib
import sys

from pdrop_jax.cli.options import (
    Attention,
    Dtype,
    Flag,
    Json,
    Layers,
    Mesh,
    Model,
    NoVerify,
    OutsideImages,
    Process,
    Processes,
    Quantize,
    QuantizeCache,
    Ratios,
    SamplingOptions,
    Score,
    device_mesh,
    share_of,
)
from pdrop_jax.errors import printable
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.schedule import parse_schedule


def run(
    questions: pathlib.Path,
    out: pathlib.Path,
    model: Model = None,
    images: pathlib.Path = pathlib.Path(),
    layers: Layers = None,
    ratios: Ratios = None,
    score: Score = None,
    batch_size: int = 8,
    sampling: SamplingOptions = Sampling(max_new_tokens=128),
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_cache: QuantizeCache = None,
    attention: Attention = "auto",
    mesh: Mesh = (),
    no_verify: NoVerify = False,
    outside_images: OutsideImages = False,
    processes: Processes = None,
    process: Process = None,
    overwrite: Flag = False,
    json_output: Json = False,
) -> int:
    """Answer every question of a file. An interrupted run is resumed by running the same command again.

    Several processes with the same command share the questions; the last to finish writes OUT.

    Args:
      questions: Question file: LLaVA's JSON lines, or its JSON list of conversations.
      out: Answer file to write, LLaVA's JSON lines; incomplete answers are in OUT.unfinished.
      images: Folder of the images.
      batch_size: Questions per batch.
      overwrite: Delete existing answers in OUT and OUT.unfinished and start over.
    """
    from pdrop_jax.eval.evaluate import evaluate
    from pdrop_jax.generation.pretrained import DEMO

    try:
        result = evaluate(
            model or DEMO,
            questions,
            images,
            out,
            schedule=parse_schedule(layers, ratios, score),
            dtype=dtype,
            quantize=quantize,
            quantize_cache=quantize_cache,
            mesh=device_mesh(mesh),
            batch_size=batch_size,
            sampling=sampling,
            implementation=attention,
            verify=not no_verify,
            outside_images=outside_images,
            overwrite=overwrite,
            share=share_of(processes, process),
        )
    except KeyboardInterrupt:
        print(
            f"pdrop eval: interrupted; the answers so far are in {printable(out)}.unfinished; "
            "run the same command to resume",
            file=sys.stderr,
        )
        return 130
    if json_output:
        print(json.dumps(dataclasses.asdict(result), default=str))
    elif result.missing:
        print(
            f"{printable(out)}: {result.answered:,} new answers, {result.seconds:.1f} s; {result.missing:,} of "
            f"{result.questions:,} are still missing from other processes, the last of which writes the file"
        )
    elif result.answered:
        print(
            f"{printable(out)}: {result.questions:,} answers, {result.answered:,} of them new, {result.seconds:.1f} s"
        )
    else:
        print(f"{printable(out)}: all {result.questions:,} questions were already answered")
    return 0
