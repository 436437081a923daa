"""``pdrop study``: what dropping does to a model's answers, beside noise."""

import json
import pathlib
import sys
from typing import Annotated

import tyro

from pdrop_jax.cli.options import LAYERS, Dtype, File, Flag, Model, NoVerify, OutsideImages, progress, unset
from pdrop_jax.errors import UserError, printable
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.io import check_outputs, write_file
from pdrop_jax.schedule import parse_schedule


def run(
    questions: pathlib.Path,
    model: Model = None,
    images: pathlib.Path = pathlib.Path(),
    layers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="N [N …]|all")] = ("all",),
    ratios: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0),
    schedule_layers: Annotated[tuple[str, ...] | None, unset(LAYERS)] = None,
    schedule_ratios: Annotated[tuple[float, ...] | None, unset("R [R …]")] = None,
    scores: Annotated[tuple[str, ...] | None, unset("NAME [NAME …]")] = None,
    limit: Annotated[int | None, unset("N")] = None,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    dtype: Dtype = None,
    no_verify: NoVerify = False,
    out: File = None,
    plot: File = None,
    html: File = None,
    outside_images: OutsideImages = False,
    overwrite: Flag = False,
) -> None:
    """Measure what dropping image tokens does to a model's answers, next to the effect of unrelated noise.

    Every question is answered by the dense model, with a single drop at each layer and ratio, with other scoring
    functions, and under perturbations that have nothing to do with dropping. Lines of the question file may also hold
    the expected "answer" and the question "reworded".

    Args:
      questions: Question file, LLaVA's JSON lines.
      images: Folder of the images.
      layers: Layers of the single drops.
      ratios: Ratios of the single drops.
      schedule_layers: Layers of the schedule at which scoring functions are compared (default: the checkpoint's).
      schedule_ratios: Ratios of that schedule (default: the checkpoint's).
      scores: Scoring functions to compare, names in pdrop_jax.model.scores (default: all that apply).
      limit: Use only the first LIMIT questions.
      batch_size: Questions per batch.
      max_new_tokens: Maximum number of new tokens in an answer; decoding is greedy.
      out: Write all results as JSON.
      plot: Write a plot of the effects (.png, .svg or .pdf).
      html: Write a self-contained HTML report with images.
      overwrite: Overwrite existing --out, --plot and --html files.
    """
    from pdrop_jax.analysis.plots import PLOTS, check_matplotlib

    if plot or html:
        check_matplotlib()
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, got {limit}")
    try:
        which = None if layers == ("all",) else [int(layer) for layer in layers]
    except ValueError:
        raise UserError(f"--layers takes whole numbers or 'all', got {' '.join(layers)}") from None

    from pdrop_jax.convert.pretrained import DEMO, load
    from pdrop_jax.eval.questions import read_questions

    asked = read_questions(questions, images, outside_images)[:limit]
    inputs = [model or DEMO, questions, *(image for question in asked for image in question.images)]
    check_outputs([(out, ()), (plot, PLOTS), (html, [".html"])], overwrite=overwrite, inputs=inputs)

    from pdrop_jax.analysis.study import run_study
    from pdrop_jax.analysis.study_report import report, table, warning

    with progress("loading"):
        loaded = load(model or DEMO, dtype=dtype, verify=not no_verify)
    study = run_study(
        loaded,
        asked,
        Sampling(max_new_tokens=max_new_tokens),
        schedule=parse_schedule(schedule_layers, schedule_ratios),
        layers=which,
        ratios=ratios,
        scores=scores,
        batch_size=batch_size,
    )
    print(printable(table(study), keep="\n"))  # before anything is written: the disk may be full
    if warning(study):
        print(f"pdrop study: warning: {warning(study)}", file=sys.stderr)
    if out:
        write_file(out, json.dumps(study.as_json()) + "\n", overwrite)
    if plot:
        from pdrop_jax.analysis.plots import save_plot, study_plot

        save_plot(study_plot(study), plot, overwrite)
    if html:
        write_file(html, report(study, loaded, asked), overwrite)
