"""``pdrop tune``: calibrate a drop schedule on samples, for the model as it is deployed."""

import json
import pathlib
import sys
from typing import Annotated, Any

import tyro

from pdrop_jax.cli.options import (
    Dtype,
    Flag,
    Json,
    NoVerify,
    OutsideImages,
    Quantize,
    QuantizeCache,
    progress,
    unset,
)
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_new_folder


def run(
    samples: pathlib.Path,
    model: Annotated[tyro.conf.Positional[str | None], unset("MODEL")] = None,
    images: pathlib.Path = pathlib.Path(),
    keep: Annotated[float | None, unset("R")] = None,
    macs: Annotated[float | None, unset("N")] = None,
    cache_bytes: Annotated[float | None, unset("N")] = None,
    layers: Annotated[tuple[int, ...] | None, unset("N [N …]")] = None,
    score: str = "quota",
    weights: Annotated[tuple[float, float, float, float] | None, unset("M T I R")] = None,
    quantize: Quantize = None,
    quantize_cache: QuantizeCache = None,
    search: Flag = False,
    rounds: int = 2,
    limit: Annotated[int | None, unset("N")] = None,
    batch_size: int = 8,
    dtype: Dtype = None,
    no_verify: NoVerify = False,
    outside_images: OutsideImages = False,
    out: Annotated[pathlib.Path | None, unset("DIR")] = None,
    json_output: Json = False,
) -> int:
    """Calibrate a drop schedule on samples with pictures, within a budget, and save it with a copy of the model.

    The drops are allocated to layers by how little quantization disturbs them (QUOTA; without --quantize evenly), or
    with --search by a coordinate search for the smallest KL to the dense model in float. Scores, layers and the search
    use the model as --quantize and --quantize-cache deploy it.

    Args:
      samples: Question file with pictures, LLaVA's JSON lines; answers are not needed.
      model: A model as for pdrop generate (default: the demo model).
      images: Folder of the images.
      keep: Budget: share of image tokens kept, averaged over all layers.
      macs: Budget in place of --keep: MACs of the language model for the image tokens, by the paper's formula.
      cache_bytes: Budget in place of --keep: KV cache bytes of the image tokens.
      layers: Drop after these many layers (default: the range in which text attends to the picture; with --search three
        layers to begin with).
      score: Token-scoring function of the schedule.
      weights: Weights of the score quota: magnitude, attention of text, attention of image tokens, quantization
        residual (default: 1 1 1 1).
      search: Search for layers and ratios.
      rounds: Passes of the search over all layers and ratios.
      limit: Use only the first LIMIT samples.
      batch_size: Samples per batch.
      out: Write the model with the schedule to this new folder. An interrupted search is resumed by the same command;
        its results are in OUT.search.unfinished.
    """
    from pdrop_jax.analysis.budget import Budget

    if [keep, macs, cache_bytes].count(None) != 2:
        raise UserError("give one budget: --keep R, --macs N or --cache-bytes N")
    if keep is not None and not 0 < keep < 1:
        raise UserError(f"--keep is a share of the image tokens between 0 and 1, got {keep:g}")
    for name, value in (("--limit", limit), ("--rounds", rounds)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if out is not None:
        check_new_folder(out)

    from pdrop_jax.analysis.tune.tune import Task, save, tune
    from pdrop_jax.checkpoint import fingerprint
    from pdrop_jax.convert.cache import model_folder
    from pdrop_jax.eval.questions import read_questions
    from pdrop_jax.generation.pretrained import DEMO, load
    from pdrop_jax.paths import as_path
    from pdrop_jax.schedule import DropSchedule

    asked = read_questions(samples, images, outside_images)[:limit]
    if not any(question.images for question in asked):
        raise UserError(f"{samples} has no pictures: a schedule is calibrated on image tokens")
    folder = as_path(model_folder(model or DEMO, dtype))
    with progress("loading"):
        exact = load(folder, dtype=dtype, verify=not no_verify)
        deployed = exact
        if quantize or quantize_cache:
            deployed = load(folder, dtype=dtype, verify=False, quantize=quantize, quantize_cache=quantize_cache)
    task = Task(
        budget=None if keep is not None else Budget.of(None, macs, cache_bytes),
        keep=keep,
        layers=layers,
        fields=DropSchedule((), (), exact.config.schedule.positions, score, weights=weights),
        rounds=rounds if search else 0,
        batch_size=batch_size,
        deployed=f"{fingerprint(folder)} {quantize} {quantize_cache}",
    )
    try:
        found = tune(exact, deployed, asked, task, out)
        if out is not None:
            save(folder, out, found.schedule)
    except KeyboardInterrupt:
        journal = f"{out}.search.unfinished"
        kept = search and out is not None and as_path(journal).exists()
        again = f"; run the same command to resume from {printable(journal)}" if kept else ""
        print(f"pdrop tune: interrupted{again}", file=sys.stderr)
        return 130
    if json_output:
        print(json.dumps(found.as_json()))
        return 0
    print(_table(found, exact.config.text.num_layers))
    schedule = found.schedule
    ratios = " ".join(f"{ratio:.6g}" for ratio in schedule.ratios)
    print(f"\n--layers {' '.join(map(str, schedule.layers))} --ratios {ratios} --score {schedule.score}")
    if found.kl is not None:
        print(f"KL to the dense model in float: {found.kl:.4g} nats")
    if out is not None:
        print(f"{printable(out)}: the model with this schedule")
    return 0


def _table(found: Any, num_layers: int) -> str:
    """A Markdown table with a row for each layer."""
    kept = dict(zip(found.schedule.layers, found.schedule.ratios, strict=True))
    rows = [
        ["layer", "sensitivity", "attention of text to the picture", "kept from here on"],
        ["---"] * 4,
    ]
    for layer in range(num_layers):
        ratio = f"{kept[layer]:.1%}" if layer in kept else ""
        sensitivity, attention = found.calibration.sensitivity[layer], found.calibration.attention[layer]
        rows.append([str(layer), f"{sensitivity:.3g}", f"{attention:.1%}", ratio])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
