"""``pdrop study``: what dropping does to a model's answers, beside noise."""

import json
import pathlib
from typing import Annotated, Literal

import tyro

from pdrop_jax.cli.options import Layers, Ratios, progress
from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import check_outputs, write_file
from pdrop_jax.schedule import parse_schedule


def run(
    model: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="MODEL")],
    questions: pathlib.Path,
    images: pathlib.Path = pathlib.Path(),
    layers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="N [N …]|all")] = ("all",),
    ratios: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0),
    schedule_layers: Layers = None,
    schedule_ratios: Ratios = None,
    scores: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME [NAME …]")] = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    dtype: Literal["float32", "bfloat16"] | None = None,
    no_verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    out: pathlib.Path | None = None,
    plot: pathlib.Path | None = None,
    html: pathlib.Path | None = None,
    outside_images: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Ask every question densely, with one drop at each layer and ratio, by other scores, and in ways of mere noise.

    A line of the question file may also hold the expected "answer" and the question "reworded".

    Args:
      model: a checkpoint.
      questions: LLaVA's JSON lines.
      images: folder of the pictures.
      layers: of the single drops.
      ratios: of the single drops.
      schedule_layers: of the schedule that scores are compared at; without it the checkpoint's own.
      schedule_ratios: its ratios.
      scores: names in pdrop_jax.model.scores; without it all that can rank.
      limit: ask only the first so many questions.
      batch_size: questions asked at a time.
      max_new_tokens: length of an answer.
      dtype: of the computation, without it the checkpoint's own.
      no_verify: load the weights without comparing them with their checksums.
      out: file for everything as JSON.
      plot: file to draw the effects into (.png, .svg or .pdf).
      html: file for a report with pictures, which needs no network.
      outside_images: allow pictures that lie outside --images, as "../1.png" does.
      overwrite: replace the files of --out, --plot and --html if they are there.
    """
    from pdrop_jax.analysis.plots import PLOTS, check_matplotlib

    if plot or html:
        check_matplotlib()
    if limit is not None and limit < 1:
        raise UserError(f"there is no question to ask: --limit must be at least 1, got {limit}")
    try:
        which = None if layers == ("all",) else [int(layer) for layer in layers]
    except ValueError:
        raise UserError(f"--layers takes whole numbers or all, got {' '.join(layers)}") from None

    from pdrop_jax.eval.questions import read_questions

    asked = read_questions(questions, images, outside_images)[:limit]
    inputs = [model, questions, *(image for question in asked for image in question.images)]
    check_outputs([(out, ()), (plot, PLOTS), (html, [".html"])], overwrite=overwrite, inputs=inputs)

    from pdrop_jax.analysis.study import run_study
    from pdrop_jax.analysis.study_report import report, table
    from pdrop_jax.generation.pretrained import load

    with progress("loading"):
        loaded = load(model, dtype=dtype, verify=not no_verify)
    study = run_study(
        loaded,
        asked,
        schedule=parse_schedule(schedule_layers, schedule_ratios),
        layers=which,
        ratios=ratios,
        scores=scores,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    print(printable(table(study), keep="\n"))  # before anything is written: the disk may be full
    if out:
        write_file(out, json.dumps(study.as_json()) + "\n", overwrite)
    if plot:
        from pdrop_jax.analysis.plots import save_plot, study_plot

        save_plot(study_plot(study), plot, overwrite)
    if html:
        write_file(html, report(study, loaded, asked), overwrite)
