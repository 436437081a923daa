"""The effect of dropping on a model's answers: the paper's redundancy study, other scores, controls, and noise.

Everything is compared with the dense model on the same questions:

- one drop: a single drop at each layer and ratio (figure 1 of the paper);
- scores: other scoring functions, at the same numbers of tokens;
- controls: the tokens that another question would keep, and no image at all;
- noise: perturbations that have nothing to do with dropping: the question in other words, the other dtype, and another
  batch size. An effect that is no larger than these is negligible.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pdrop_jax.analysis.cost import layer_tokens, paper_macs
from pdrop_jax.analysis.effects import Answers, Effect, Mean, beyond, effect_of, mean_of
from pdrop_jax.batch import Batch
from pdrop_jax.errors import UserError
from pdrop_jax.eval.batching import check_batch_size, plan_batches, read_batches
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.engine import generate_batch
from pdrop_jax.generation.pretrained import Model, reschedule
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.model.scores import SCORES, find_score
from pdrop_jax.schedule import DropSchedule

ANSWER, REWORDED = "answer", "reworded"  # fields that a question file may have besides LLaVA's


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to ask all questions.

    Attributes:
      group: "one drop", "scores", "controls" or "noise".
      name: name within the group.
      schedule: drop schedule.
    """

    group: str
    name: str
    schedule: DropSchedule


@dataclasses.dataclass(frozen=True)
class StudyRow:
    """The results of a setting.

    Attributes:
      average_tokens: image tokens that a layer sees, out of ``Study.image_tokens``, averaged over layers.
      macs: multiply-accumulates of the language model for them, by the paper's formula.
      flipped: share of answers that differ from the dense model's.
      kl: KL divergence in nats of the first new token's distribution from the dense model's.
      right: share of expected answers; None if the questions do not have them.
      beyond: kinds of noise that the flipped answers, and likewise the divergences, significantly exceed.
      effect: the effect on each question.
    """

    setting: Setting
    average_tokens: float
    macs: float
    flipped: Mean
    kl: Mean
    right: Mean | None
    beyond: dict[str, list[str]]
    effect: Effect

    def as_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(dataclasses.replace(self, effect=None))  # type: ignore[arg-type]
        data["setting"]["schedule"] = self.setting.schedule.to_json()
        by_question = {name: getattr(self.effect, name) for name in ("flipped", "kl", "right")}
        data["effect"] = {name: values.tolist() for name, values in by_question.items() if values is not None}
        return data


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
        right = None if self.right is None else dataclasses.asdict(self.right)
        rows = [row.as_json() for row in self.rows]
        return fields | {"schedule": self.schedule.to_json(), "right": right, "rows": rows}


def run_study(
    model: Model,
    questions: Sequence[Question],
    sampling: Sampling = Sampling(max_new_tokens=16),
    *,
    schedule: DropSchedule | None = None,
    layers: Sequence[int] | None = None,
    ratios: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 1.0),
    scores: Sequence[str] | None = None,
    batch_size: int = 8,
) -> Study:
    """Asks all questions in every setting.

    The questions' fields may hold the expected ``answer`` and the same question ``reworded``. Unless all questions have
    the latter, that kind of noise is left out.

    Args:
      sampling: of every setting, with the same seed; the default is greedy decoding of up to 16 tokens.
      schedule: schedule at which scores and controls are compared; None is the model's own.
      layers: layers of the single drops, which use the score "pyramiddrop"; None is all.
      ratios: ratios of the single drops.
      scores: names in ``model.scores``; None is all that work with this schedule.

    Raises:
      UserError: the schedule drops nothing, a score is unknown, or ``plan_batches`` raises it.
    """
    check_batch_size(batch_size + 1)  # one kind of noise has larger batches
    config = model.config
    schedule = dataclasses.replace(config, schedule=schedule or config.schedule).schedule
    if not schedule.layers:
        raise UserError("the schedule drops nothing, so there is nothing to study: give one that does")
    if not questions:
        raise UserError("there is no question to ask")
    L = config.text.num_layers
    layers = range(L) if layers is None else layers
    settings = [
        Setting("one drop", f"layer {layer}, ratio {ratio:g}", DropSchedule((layer,), (ratio,), schedule.positions))
        for layer in layers
        for ratio in ratios
    ]
    names = possible_scores(model, schedule) if scores is None else scores
    settings += [Setting("scores", name, dataclasses.replace(schedule, score=name)) for name in names]
    other = Setting("controls", "another question's tokens", dataclasses.replace(schedule, score="given"))
    settings += [other, Setting("controls", "no image", DropSchedule((0,), (0.0,), schedule.positions, "none"))]
    for setting in settings:  # fail before the first answer
        find_score(dataclasses.replace(config, schedule=setting.schedule))

    expected = _field(questions, ANSWER)
    clusters = [question.images[0] if question.images else question.id for question in questions]
    asking = functools.partial(ask, questions=questions, batch_size=batch_size, sampling=sampling)
    whole = reschedule(model, DropSchedule.none())
    reference = asking(whole)
    noises = _noises(whole, questions, batch_size, asking)
    effects = {name: effect_of(reference, answers, expected) for name, answers in noises}
    rows = []
    with tqdm(settings, "settings", disable=None) as bar:
        for setting in bar:
            bar.set_postfix_str(f"{setting.group}: {setting.name}")
            given = None
            if setting is other:
                given = stays_for_another(asking(reschedule(model, schedule)), clusters)
            answers = asking(reschedule(model, setting.schedule), given=given)
            rows.append((setting, effect_of(reference, answers, expected)))
    rows += [(Setting("noise", name, whole.config.schedule), effect) for name, effect in effects.items()]
    sizes = [sum(images) for images in reference.image_tokens if images]
    n = round(sum(sizes) / max(len(sizes), 1))

    def row(setting: Setting, effect: Effect) -> StudyRow:
        more = {name: beyond(effect, noise, clusters) for name, noise in effects.items()}
        return StudyRow(
            setting,
            layer_tokens(config.text, setting.schedule, n) / L,
            paper_macs(config.text, setting.schedule, n),
            mean_of(effect.flipped, clusters),
            mean_of(effect.kl, clusters),
            None if effect.right is None else mean_of(effect.right, clusters),
            {kind: [name for name, found in more.items() if found[i]] for i, kind in enumerate(("flipped", "kl"))},
            effect,
        )

    right = effect_of(reference, reference, expected).right
    return Study(
        len(questions),
        [question.id for question in questions],
        len(set(map(str, clusters))),
        n,
        L,
        str(_dtype(model)),
        schedule,
        None if right is None else mean_of(right, clusters),
        [row(*pair) for pair in rows],
    )


def possible_scores(model: Model, schedule: DropSchedule) -> list[str]:
    """Names of the scores that work with this schedule without further input."""
    found = []
    for name in SCORES:
        if name in ("none", "given"):
            continue
        try:
            find_score(dataclasses.replace(model.config, schedule=dataclasses.replace(schedule, score=name)))
        except UserError:
            continue
        found.append(name)
    return found


def ask(
    model: Model,
    questions: Sequence[Question],
    *,
    batch_size: int,
    sampling: Sampling,
    given: Sequence[Sequence[np.ndarray]] | None = None,
) -> Answers:
    """Answers to all questions.

    Args:
      given: [question][image] -> (n,) scores of the image's tokens, for the score "given".
    """
    found: list[tuple[str, np.ndarray, Any, Any]] = [("", np.empty(0), (), ())] * len(questions)
    groups = plan_batches(model.processor, questions, batch_size, sampling.max_new_tokens)
    for group, batch in zip(groups, read_batches(model.processor, questions, groups, batch_size), strict=True):
        if given is not None:
            batch = _with_scores(batch, [given[number] for number in group.questions])
        answer = generate_batch(model, batch, sampling)
        first = np.asarray(jax.nn.log_softmax(answer.first_logits))
        rows = zip(answer.texts, first, answer.kept, answer.image_tokens, strict=True)
        for number, row in zip(group.questions, rows, strict=False):  # a batch may be padded
            found[number] = row
    texts, log_probs, kept, image_tokens = map(list, zip(*found, strict=True))
    return Answers(texts, np.stack(log_probs), kept, image_tokens)


def _noises(
    model: Model, questions: Sequence[Question], batch_size: int, asking: Callable[..., Answers]
) -> Iterator[tuple[str, Answers]]:
    """Answers of the dense ``model`` under perturbations that should not matter."""
    yield "nothing", asking(model, batch_size=batch_size + 1)
    dtype = jnp.bfloat16 if _dtype(model) == jnp.float32 else jnp.float32
    cast = dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(dtype), model.params))
    yield jnp.dtype(dtype).name, asking(cast)
    reworded = _field(questions, REWORDED)
    if reworded:
        asked = [dataclasses.replace(old, text=text) for old, text in zip(questions, reworded, strict=True)]
        yield "other words", asking(model, questions=asked)


def _field(questions: Sequence[Question], name: str) -> list[str] | None:
    """The field ``name`` of every question; None if a question does not have it."""
    if not all(isinstance(question.fields.get(name), str) for question in questions):
        return None
    return [question.fields[name] for question in questions]


def stays_for_another(answers: Answers, clusters: Sequence[object]) -> list[list[np.ndarray]]:
    """[question][image] -> (n,) number of drops that each token survives for the next question with as many tokens.

    A question about the same image is preferred. A question without such a neighbour uses its own tokens.
    """
    count = len(answers.texts)

    def donor(n: int) -> int:
        alike = [
            i % count for i in range(n + 1, n + count) if answers.image_tokens[i % count] == answers.image_tokens[n]
        ]
        return next((i for i in alike if clusters[i] == clusters[n]), alike[0] if alike else n)

    def depth(kept: Sequence[Sequence[Sequence[int]]], sizes: Sequence[int]) -> list[np.ndarray]:
        scores = [np.zeros(size, np.float32) for size in sizes]
        for images in kept:
            for image, tokens in zip(scores, images, strict=True):
                image[tokens] += 1
        return scores

    return [depth(answers.kept[donor(n)], answers.image_tokens[n]) for n in range(count)]


def _with_scores(batch: Batch, given: Sequence[Sequence[np.ndarray]]) -> Batch:
    """``batch`` with the scores [row][image] at its image tokens; padding rows have zeros."""
    image_id = np.asarray(batch.image_id)
    scores = np.zeros(image_id.shape, np.float32)
    for row, images in enumerate(given):
        for number, values in enumerate(images, 1):
            scores[row, image_id[row] == number] = values
    return dataclasses.replace(batch, scores=scores)


def _dtype(model: Model) -> Any:
    return jax.tree.leaves(model.params)[0].dtype
