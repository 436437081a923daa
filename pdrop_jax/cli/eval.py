"""``pdrop eval``: answer a file of questions."""

import dataclasses
import json
import pathlib
import sys
from typing import Annotated, Literal

import tyro

from pdrop_jax.cli.options import Layers, Mesh, Ratios, SamplingOptions, mesh_sizes
from pdrop_jax.errors import printable
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.schedule import parse_schedule


def run(
    model: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="MODEL")],
    questions: pathlib.Path,
    out: pathlib.Path,
    images: pathlib.Path = pathlib.Path(),
    layers: Layers = None,
    ratios: Ratios = None,
    score: str | None = None,
    batch_size: int = 8,
    sampling: SamplingOptions = Sampling(max_new_tokens=128),
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: Literal["int8"] | None = None,
    attention: Literal["auto", "xla", "blocked", "cudnn", "splash"] = "auto",
    mesh: Mesh = (),
    no_verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    outside_images: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Answer every question of a file. Killed at any moment, the same command goes on where it was.

    Args:
      model: a checkpoint.
      questions: LLaVA's JSON lines, or its JSON list of conversations.
      out: file for the answers, LLaVA's JSON lines; until it is complete they are in OUT.unfinished.
      images: folder of the pictures.
      layers: drop image tokens after these many layers; without it the checkpoint's own schedule. "none" drops nothing.
      ratios: share of the image tokens kept at each drop.
      score: what image tokens are chosen by, a name in pdrop_jax.model.scores; without it pyramiddrop.
      batch_size: questions answered at a time.
      dtype: of the computation, without it the checkpoint's own.
      quantize: store the weights of the decoder's linear layers in this type; activations keep theirs.
      attention: implementation.
      mesh: devices along the axes data, fsdp and tensor, which share the work; without it one device.
      no_verify: load the weights without comparing them with their checksums.
      outside_images: allow pictures that lie outside --images, as "../1.png" does.
      overwrite: start over: remove the answers that are in OUT and OUT.unfinished, whatever they are of.
      json_output: print one JSON object instead of text.
    """
    from pdrop_jax.eval.evaluate import evaluate
    from pdrop_jax.sharding import make_mesh

    try:
        result = evaluate(
            model,
            questions,
            images,
            out,
            schedule=parse_schedule(layers, ratios, score),
            dtype=dtype,
            quantize=quantize,
            mesh=make_mesh(mesh_sizes(mesh)) if mesh else None,
            batch_size=batch_size,
            sampling=sampling,
            implementation=attention,
            verify=not no_verify,
            outside_images=outside_images,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        print(
            f"pdrop eval: stopped; the answers so far are in {printable(out)}.unfinished, the same command goes on",
            file=sys.stderr,
        )
        return 130
    if json_output:
        print(json.dumps(dataclasses.asdict(result), default=str))
    elif result.answered:
        print(
            f"{printable(out)}: {result.questions:,} answers, {result.answered:,} of them new, {result.seconds:.1f} s"
        )
    else:
        print(f"{printable(out)}: all {result.questions:,} questions were answered before")
    return 0
