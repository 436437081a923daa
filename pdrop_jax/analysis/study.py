"""The effect of dropping on a model's answers: the paper's redundancy study, other scores, controls, and noise.

``settings`` says what is asked, ``asking`` asks it, and here the answers are compared with the dense model's.
"""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pdrop_jax.analysis.asking import ANSWER, StudyAnswer, answer_settings, clusters_of
from pdrop_jax.analysis.comparison import Tests, compare
from pdrop_jax.analysis.cost import layer_tokens, paper_macs
from pdrop_jax.analysis.dose import equivalent_sizes
from pdrop_jax.analysis.effects import Effect, Mean, average, beyond, flipped, mean_of, right
from pdrop_jax.analysis.settings import (
    DENSE,
    TEMPERATURE,
    Setting,
    StudyOptions,
    dtype_of,
    field,
    make_settings,
    study_schedule,
)
from pdrop_jax.analysis.significance import check_samples
from pdrop_jax.eval.batching import check_batch_size
from pdrop_jax.eval.journal import Journal
from pdrop_jax.eval.questions import Question
from pdrop_jax.eval.shares import Share
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.io import check_output
from pdrop_jax.model.quantization import quantization_name, quantization_of
from pdrop_jax.schedule import DropSchedule

SAMPLED = f"sampled at temperature {TEMPERATURE:g}"
TESTED = ("one drop", "scores", "controls")  # groups of settings whose effects are tested


@dataclasses.dataclass(frozen=True)
class StudyRow:
    """The results of a setting.

    Attributes:
      average_tokens: image tokens that a layer sees, out of ``Study.image_tokens``, averaged over layers.
      macs: multiply-accumulates of the language model for them, by the paper's formula.
      flipped: share of answers that differ from the dense model's.
      kl: KL divergence in nats of the first new token's distribution from the dense model's.
      jsd: likewise the Jensen-Shannon divergence.
      right: share of expected answers; None if the questions do not have them.
      beyond: kinds of noise that the flipped answers, and likewise the divergences, significantly exceed.
      rewording: of a rewording its edit size in percent; of anything else the edit size of the rewording that changes
        as many answers, infinite beyond the largest; None if no edit sizes are compared.
      tests: paired tests against each rewording, by its name.
      effect: the effect on each question.
    """

    setting: Setting
    average_tokens: float
    macs: float
    flipped: Mean
    kl: Mean
    jsd: Mean
    right: Mean | None
    beyond: dict[str, list[str]]
    rewording: Mean | None
    tests: Tests
    effect: Effect

    def as_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("setting", "effect")}
        setting = self.setting
        by_question = {name: getattr(self.effect, name) for name in ("flipped", "kl", "jsd", "right", "outcome")}
        effect = {name: values.tolist() for name, values in by_question.items() if values is not None}
        return {
            "setting": {"group": setting.group, "name": setting.name, "schedule": setting.schedule.to_json()},
            **{name: _plain(value) for name, value in data.items()},
            "effect": effect,
        }


@dataclasses.dataclass(frozen=True)
class Study:
    """All settings on one model and one set of questions. Effects are in the order of ``ids``.

    Attributes:
      image_tokens: mean number of image tokens of a question with images.
      right: share of expected answers of the dense model; None if the questions do not have them.
    """

    questions: int
    ids: list[str | int]
    pictures: int
    image_tokens: int
    num_layers: int
    dtype: str
    schedule: DropSchedule
    right: Mean | None
    rows: list[StudyRow]

    def group(self, name: str) -> list[StudyRow]:
        return [row for row in self.rows if row.setting.group == name]

    def as_json(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rows = [row.as_json() for row in self.rows]
        return fields | {"schedule": self.schedule.to_json(), "right": _plain(self.right), "rows": rows}


def run_study(
    model: Model,
    questions: Sequence[Question],
    options: StudyOptions = StudyOptions(),
    *,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    out: str | os.PathLike | None = None,
    metadata: Mapping[str, Any] = {},
    share: Share = Share(),
    overwrite: bool = False,
) -> Study | None:
    """Asks all questions in every setting, and compares the answers; decoding is greedy except for draws.

    The questions' fields may hold the expected ``answer`` and the same question ``reworded``. Unless all questions have
    the latter, that kind of noise is left out.

    Args:
      max_new_tokens: maximum number of new tokens in an answer.
      out: the file that the study is going to be written to. The answers are beside it, ``OUT.unfinished``, so that
        an interrupted study goes on; they are removed by the caller. None keeps them nowhere.
      metadata: everything that the answers depend on; a study goes on with those of the same.
      share: which of several processes this is; with more than one, ``out`` is needed.
      overwrite: delete the answers beside ``out`` and start over.

    Returns:
      None if other processes have not answered their questions yet, or have written the study already.

    Raises:
      UserError: the schedule drops nothing, a score is unknown, there are fewer than 2 questions, the answers beside
        ``out`` are of another study, or ``plan_batches`` raises it.
    """
    check_batch_size(batch_size + 1)  # one kind of noise has larger batches
    schedule = study_schedule(model, options)
    check_samples(len(questions))
    settings = make_settings(model, questions, options)
    with _journal(out, share, overwrite) as journal:
        answers = answer_settings(
            model,
            questions,
            settings,
            journal,
            {**metadata, "list of settings": [setting.name for setting in settings]},
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            schedule=schedule,
        )
    return None if answers is None else _study(model, questions, settings, answers, schedule)


@contextlib.contextmanager
def _journal(out: str | os.PathLike | None, share: Share, overwrite: bool) -> Iterator[Journal]:
    with contextlib.ExitStack() as stack:
        if out is None:
            target = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdrop-"))) / "study.json"
        else:
            target = check_output(out, overwrite=True)
        yield stack.enter_context(Journal(target, overwrite, share))


def _study(
    model: Model,
    questions: Sequence[Question],
    settings: Sequence[Setting],
    answers: Sequence[Sequence[StudyAnswer]],
    schedule: DropSchedule,
) -> Study:
    """The statistics of [setting][question] -> answer."""
    config, clusters, expected = model.config, clusters_of(questions), field(questions, ANSWER)
    reference = [answer.text for answer in answers[0]]

    def mean_tokens(found: Sequence[StudyAnswer]) -> int:
        sizes = [answer.tokens for answer in found if answer.tokens]
        return round(sum(sizes) / max(len(sizes), 1))

    n = mean_tokens(answers[0])
    shown = {setting: mean_tokens(found) for setting, found in zip(settings, answers, strict=True) if setting.tokens_of}

    def effect_of(found: Sequence[StudyAnswer]) -> Effect:
        texts = [answer.text for answer in found]
        kl, jsd = (np.array([getattr(answer, name) for answer in found]) for name in ("kl", "jsd"))
        outcomes = [answer.outcome for answer in found if answer.outcome is not None]
        return Effect(
            texts,
            flipped(reference, texts),
            kl,
            jsd,
            None if expected is None else right(texts, expected),
            np.array(outcomes) if len(outcomes) == len(found) else None,
        )

    effects = {setting: effect_of(found) for setting, found in zip(settings, answers, strict=True)}
    dense = effects.pop(settings[0])
    draws = [effect for setting, effect in effects.items() if setting.group == "draws"]
    effects = {setting: effect for setting, effect in effects.items() if setting.group != "draws"}
    if draws:
        effects[Setting("noise", SAMPLED, DENSE)] = average(draws)
    rewordings = {setting: effect for setting, effect in effects.items() if setting.rewordings is not None}
    edits = {s: np.array([each.size for each in s.rewordings or ()]) for s in rewordings}
    noises: dict[str, Effect] = {s.name: effect for s, effect in effects.items() if s.group == "noise" and not s.dosed}
    equivalents: dict[Setting, Mean] = {s: mean_of(edits[s], clusters) for s in rewordings}
    dosed = [s for s in rewordings if s.dosed]
    if dosed:
        others = [s for s in effects if s not in rewordings]
        found = equivalent_sizes(
            [effects[s].flipped for s in others],
            [edits[s] for s in dosed],
            [effects[s].flipped for s in dosed],
            clusters,
        )
        equivalents |= dict(zip(others, found, strict=True))
    tested = {s: effect for s, effect in effects.items() if s.group in TESTED}
    tests = compare(dense, list(tested.values()), {s.name: effect for s, effect in rewordings.items()})
    tests_of = dict(zip(tested, tests, strict=True))

    def row(setting: Setting, effect: Effect) -> StudyRow:
        more = {name: beyond(effect, noise, clusters) for name, noise in noises.items()}
        kinds = {"flipped": [name for name, (flips, _) in more.items() if flips]}
        kinds["kl"] = [
            name for name, (_, kl) in more.items() if kl and name != SAMPLED
        ]  # which has the same distributions
        tokens = shown.get(setting, n)
        return StudyRow(
            setting,
            layer_tokens(config.text, setting.schedule, tokens) / config.text.num_layers,
            paper_macs(config.text, setting.schedule, tokens),
            mean_of(effect.flipped, clusters),
            mean_of(effect.kl, clusters),
            mean_of(effect.jsd, clusters),
            None if effect.right is None else mean_of(effect.right, clusters),
            kinds,
            equivalents.get(setting),
            tests_of.get(setting, {}),
            effect,
        )

    quantized = quantization_name(quantization_of(model.params), config.text.cache_dtype)
    return Study(
        len(questions),
        [question.id for question in questions],
        len(set(map(str, clusters))),
        n,
        config.text.num_layers,
        ", ".join(filter(None, [str(dtype_of(model)), quantized])),
        schedule,
        None if dense.right is None else mean_of(dense.right, clusters),
        [row(*pair) for pair in effects.items()],
    )


def _plain(value: Any) -> Any:
    """``value`` for JSON, which knows neither NaN nor infinity: null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
