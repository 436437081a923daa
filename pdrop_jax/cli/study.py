"""``pdrop study``: what dropping does to a model's answers, beside noise."""

import pathlib
import sys
from typing import Annotated, Any

import tyro

from pdrop_jax.cli.options import (
    LAYERS,
    Dtype,
    File,
    Flag,
    Mesh,
    Model,
    NoVerify,
    OutsideImages,
    Process,
    Processes,
    Quantize,
    QuantizeCache,
    device_mesh,
    progress,
    share_of,
    unset,
)
from pdrop_jax.errors import UserError, printable
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
    edit_sizes: Annotated[tuple[float, ...], tyro.conf.arg(metavar="PERCENT [PERCENT …]")] = (25, 50, 100, 200),
    paraphrases: File = None,
    draws: int = 0,
    power: Annotated[float | None, unset("PERCENT")] = None,
    limit: Annotated[int | None, unset("N")] = None,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_cache: QuantizeCache = None,
    mesh: Mesh = (),
    processes: Processes = None,
    process: Process = None,
    no_verify: NoVerify = False,
    out: File = None,
    plot: File = None,
    html: File = None,
    outside_images: OutsideImages = False,
    overwrite: Flag = False,
) -> int:
    """Measure what dropping image tokens does to a model's answers, next to the effect of unrelated noise.

    Every question is answered by the dense model, with a single drop at each layer and ratio, with other scoring
    functions, with the picture downsampled to as many tokens, and under perturbations that have nothing to do with
    dropping. Lines of the question file may also hold the expected "answer" and the question "reworded". With --out, an
    interrupted study is resumed by running the same command again, and several processes share it.

    Args:
      questions: Question file, LLaVA's JSON lines.
      images: Folder of the images.
      layers: Layers of the single drops.
      ratios: Ratios of the single drops.
      schedule_layers: Layers of the schedule at which scoring functions are compared (default: the checkpoint's).
      schedule_ratios: Ratios of that schedule (default: the checkpoint's).
      scores: Scoring functions to compare, names in pdrop_jax.model.scores (default: all that apply).
      edit_sizes: Rewordings to compare with: the edit distance to the question in percent of its tokens.
      paraphrases: Rewordings to choose from, JSON lines of "question_id" and "text" (default: made from templates).
      draws: Number of times every question is also answered with sampling at temperature 0.7.
      power: Only simulate the power of a study of these questions, in which rewordings change PERCENT of the answers.
      limit: Use only the first LIMIT questions.
      batch_size: Questions per batch.
      max_new_tokens: Maximum number of new tokens in an answer; decoding is greedy.
      out: Write all results as JSON; until then the answers are in OUT.unfinished.
      plot: Write a plot of the effects (.png, .svg or .pdf).
      html: Write a self-contained HTML report with images.
      overwrite: Overwrite existing --out, --plot and --html files, and start over.
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
    share = share_of(processes, process)
    if share.count > 1 and not out:
        raise UserError(f"{share.count} processes share a study through its file: name it, --out FILE")

    from pdrop_jax.eval.questions import read_questions

    asked = read_questions(questions, images, outside_images)[:limit]
    if power is not None:
        from pdrop_jax.analysis.power import power_table

        print(power_table(len(asked), power / 100))
        return 0

    from pdrop_jax.convert.cache import model_folder
    from pdrop_jax.convert.pretrained import DEMO, load
    from pdrop_jax.paths import as_path

    inputs: list[Any] = [model or DEMO, questions, *(image for question in asked for image in question.images)]
    inputs += [paraphrases] if paraphrases else []
    again = overwrite or share.count > 1
    outputs = [(plot, PLOTS), (html, [".html"])]
    check_outputs([(out, ()), *outputs], overwrite=True, inputs=inputs)  # a study in OUT may be complete, or go on
    check_outputs(outputs, overwrite=again, inputs=inputs)

    from pdrop_jax.analysis.paraphrases import read_paraphrases
    from pdrop_jax.analysis.settings import StudyOptions
    from pdrop_jax.analysis.significance import check_samples
    from pdrop_jax.analysis.study import run_study
    from pdrop_jax.analysis.study_file import describe_study, is_finished, save_study
    from pdrop_jax.analysis.study_report import report, table, warning
    from pdrop_jax.model.quantization import quantization_name

    check_samples(len(asked))
    options = StudyOptions(
        parse_schedule(schedule_layers, schedule_ratios),
        which,
        ratios,
        scores,
        edit_sizes,
        read_paraphrases(paraphrases, asked) if paraphrases else None,
        draws,
    )
    folder = as_path(model_folder(model or DEMO, dtype))
    metadata = describe_study(
        folder,
        asked,
        images,
        options,
        dtype=dtype,
        quantized=quantization_name(quantize, quantize_cache),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    if out and not overwrite and is_finished(out, metadata):
        print(f"{printable(out)}: this study is complete")
        return 0
    with progress("loading"):
        loaded = load(
            folder,
            dtype=dtype,
            quantize=quantize,
            quantize_cache=quantize_cache,
            mesh=device_mesh(mesh),
            verify=not no_verify,
        )
    try:
        study = run_study(
            loaded,
            asked,
            options,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            out=out,
            metadata=metadata,
            share=share,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        kept = f"the answers so far are in {printable(out)}.unfinished; run the same command to resume"
        print(f"pdrop study: interrupted; {kept if out else 'nothing was kept: --out FILE would'}", file=sys.stderr)
        return 130
    if study is None:
        print(f"{printable(out)}: {share} has answered its share; the last process to finish writes the file")
        return 0
    print(printable(table(study), keep="\n"))  # before anything is written: the disk may be full
    if warning(study):
        print(f"pdrop study: warning: {warning(study)}", file=sys.stderr)
    if plot:
        from pdrop_jax.analysis.plots import save_plot, study_plot

        save_plot(study_plot(study), plot, again)
    if html:
        write_file(html, report(study, loaded, asked), again)
    if out:  # last: once it is there, the study is complete
        save_study(study, metadata, out, again)
    return 0
