"""A study as a table, and as one self-contained HTML file with charts and images."""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

from pdrop_jax.analysis.effects import Mean
from pdrop_jax.analysis.figures import answer_picture, score_picture
from pdrop_jax.analysis.plots import study_plot
from pdrop_jax.analysis.significance import Significance
from pdrop_jax.analysis.study import Study, StudyRow
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import Model, reschedule
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.schedule import DropSchedule

GROUPS = ("one drop", "scores", "controls", "noise")
PICTURED = 4  # questions in a report
MIN_PICTURES = 10  # a bootstrap over fewer images says nothing about others
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 14px } th, td { padding: .2rem .7rem; text-align: left }
tr:nth-child(even) { background: #f4f4f4 } img, svg { max-width: 100%; height: auto } figure { margin: 1.5rem 0 }
"""


def cells(study: Study, groups: Sequence[str] = GROUPS) -> list[list[str]]:
    """A header and a row for each setting, in few characters so that the table fits a narrow screen.

    "tokens" is the number of image tokens that a layer sees, averaged over layers; for "rewording, %" see
    ``StudyRow.rewording``, for "exceeds" ``_beyond``.
    """
    head = ["", "tokens", "changed, %", "KL, nats", "right, %", "rewording, %", "exceeds"]
    rows = [["dense", f"{study.image_tokens}", "", "", _share(study.right), "", ""]]
    for row in (row for group in groups for row in study.group(group)):
        rows.append(
            [
                row.setting.name,
                f"{row.average_tokens:.0f}",
                _share(row.flipped),
                f"{row.kl.value:.2g} ({row.kl.low:.2g}-{row.kl.high:.2g})",
                _share(row.right),
                _size(row.rewording, study),
                _beyond(row),
            ]
        )
    return [head, *rows]


def warning(study: Study) -> str:
    """What to say of a study of few images; otherwise an empty string."""
    if study.pictures >= MIN_PICTURES:
        return ""
    images = f"{study.pictures} image{'' if study.pictures == 1 else 's'}"
    return (
        f"The study has only {images}: its intervals, which come from resampling the images, mean nothing below "
        f"{MIN_PICTURES}. Ask about more images."
    )


def table(study: Study) -> str:
    """The study as a Markdown table."""
    head, *rows = cells(study)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _share(mean: Mean | None) -> str:
    if mean is None:
        return ""
    return f"{100 * mean.value:.1f} ({100 * mean.low:.1f}-{100 * mean.high:.1f})"


def _size(size: Mean | None, study: Study) -> str:
    """An edit size; beyond the largest rewording, "> " with its size."""
    if size is None:
        return ""
    largest = max(row.rewording.value for row in study.group("noise") if row.setting.dosed and row.rewording)
    value, low, high = (
        f"{x:.0f}" if math.isfinite(x) else f"> {largest:.0f}" for x in (size.value, size.low, size.high)
    )
    return value if value == low == high else f"{value} ({low}-{high})"


def _beyond(row: StudyRow) -> str:
    """Noise that the changed answers significantly exceed; in brackets noise that only the KL divergence exceeds."""
    flipped, kl = row.beyond["flipped"], row.beyond["kl"]
    return ", ".join([*flipped, *(f"({name})" for name in kl if name not in flipped)])


def report(study: Study, model: Model, questions: Sequence[Question]) -> str:
    """One HTML page; charts and pictures are in it.

    Args:
      model: the one studied, asked about some of ``questions`` again for their pictures.
    """
    asked = f"{study.questions:,} questions about {study.pictures:,} pictures"
    about = f"{study.image_tokens} image tokens, {study.num_layers} layers, {study.dtype}"
    schedule = study.schedule
    parts = [
        "<h1>What dropping image tokens does to the answers</h1>",
        f"<p>{asked}; {about}. Every row is compared with the same model without drops, on the same questions. In "
        "brackets are 95 % intervals, from resampling the images. <em>Tokens</em> are the image tokens that a layer "
        "sees, averaged over layers. <em>Exceeds</em> names the kinds of noise that the changed answers significantly "
        "exceed, and in brackets those that only the KL divergence exceeds. <em>Rewording</em> is the edit size of the "
        "rewording that changes as many answers, or of a rewording itself, in percent of the question's tokens.</p>",
        f"<p><strong>{warning(study)}</strong></p>" if warning(study) else "",
        f"<figure>{_svg(study_plot(study))}</figure>",
    ]
    titles = {
        "one drop": "One drop",
        "scores": f"Scores, after layers {list(schedule.layers)} keeping {list(schedule.ratios)}",
        "controls": "Controls, at the same layers",
        "noise": "Noise: nothing is dropped",
    }
    for group, title in titles.items():
        parts.append(f"<h2>{html.escape(title)}</h2>{_html_table(cells(study, [group]))}")
    parts += _tests(study)
    parts.append("<h2>Some questions</h2>")
    parts += [_pictured(model, schedule, question) for question in questions if question.images][:PICTURED]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>pdrop study</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _tests(study: Study) -> list[str]:
    """A table of p-values for each rewording that effects are tested against; one-drop rows are in the JSON file."""
    rows = [*study.group("scores"), *study.group("controls")]
    parts = []
    for name in rows[0].tests if rows else ():
        head = ["", *(test.metric for test in rows[0].tests[name])]
        lines = [[row.setting.name, *map(_p, row.tests[name])] for row in rows]
        parts.append(f"<h2>Tests against: {html.escape(name)}</h2>{_html_table([head, *lines])}")
    if parts:
        parts.append(
            "<p>Differences from the rewording on the same questions, with two-sided p-values of paired t-tests (JSD, "
            "KL) and of the paired bootstrap (flip rate, mutual information, phi), and the one-sided p-value that the "
            "drop lowers the expected answer's log-probability by more; all with Bonferroni's correction for the "
            "number of settings.</p>"
        )
    return parts


def _p(test: Significance) -> str:
    if math.isnan(test.difference):
        return "undefined"
    return f"{test.difference:+.2g}, p {'<' if test.corrected < 0.001 else '='} {max(test.corrected, 0.001):.2g}"


def _html_table(rows: list[list[str]]) -> str:
    def line(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"


def _pictured(model: Model, schedule: DropSchedule, question: Question) -> str:
    dropping = reschedule(model, schedule)
    texts, pictures = [question.text], [list(question.images)]
    dense = generate(reschedule(model, DropSchedule.none()), texts, pictures, Sampling(max_new_tokens=16)).texts[0]
    answer = generate(dropping, texts, pictures, Sampling(max_new_tokens=16))
    kept = answer_picture(question.images, answer.kept[0], dropping.processor)
    scores = score_picture(question.images, answer.scores[0], dropping.processor)
    said = f"{question.text} Dense: {dense}. With drops: {answer.texts[0]}."
    return f"<figure><figcaption>{html.escape(said)}</figcaption>{_img(kept)}{_img(scores)}</figure>"


def _img(picture: Any) -> str:
    data = io.BytesIO()
    picture.save(data, "png")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _svg(figure: Any) -> str:
    data = io.StringIO()
    figure.savefig(data, format="svg")
    text = data.getvalue()
    return text[text.index("<svg") :]  # without the XML head, which names a document type on the network
