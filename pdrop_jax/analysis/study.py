"""What dropping does to the answers of a model: the paper's redundancy study, other scores, controls, and noise.

Everything is compared with the dense model on the same questions:

- one drop: at each layer, at each ratio (figure 1 of the paper);
- scores: other ways to select_tokens, at the same numbers of tokens;
- controls: the tokens that another question would keep, no image at all;
- noise: what has nothing to do with dropping. The question in other words, the other number format, and the same again
  in batches of another size. An effect that is no larger than these is none to speak of.
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
from pdrop_jax.eval.batching import check_batch_size, plan, read_batches
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.engine import generate_batch
from pdrop_jax.generation.pretrained import Model, reschedule
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.model.scores import SCORES, find_score
from pdrop_jax.schedule import DropSchedule

ANSWER, REWORDED = "answer", "reworded"  # what a line of the question file may say besides LLaVA's fields


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to ask all questions.

    Attributes:
      group: "one drop", "scores", "controls" or "noise".
      name: within its group.
      schedule: of the drops.
    """

    group: str
    name: str
    schedule: DropSchedule


@dataclasses.dataclass(frozen=True)
class StudyRow:
    """What a setting did.

    Attributes:
      average_tokens: image tokens that a layer sees of ``Study.image_tokens``, averaged over layers.
      macs: of the language model for them, by the paper's formula.
      flipped: share of answers that are not those of the dense model.
      kl: nats, of the first new token's distribution from the dense model's.
      right: share of answers that are the expected ones; None if the questions do not say.
      beyond: kinds of noise that flipped answers are surely more than, and divergences likewise.
      effect: question by question.
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
    """All settings on one model and one set of questions, whose ids are in the order of every effect.

    Attributes:
      image_tokens: of a question with pictures, on average.
      right: share of the dense model's answers that are the expected ones; None if the questions do not say.
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
    *,
    schedule: DropSchedule | None = None,
    layers: Sequence[int] | None = None,
    ratios: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 1.0),
    scores: Sequence[str] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 16,
) -> Study:
    """Asks all questions in every setting, greedily.

    The questions' fields may hold the expected ``answer`` and the same question ``reworded``. Without the latter in all
    of them that kind of noise is left out.

    Args:
      schedule: at which scores and controls are compared; None is the model's own.
      layers: of the single drops, which go by pyramiddrop's score; None is all.
      ratios: of the single drops.
      scores: names in ``model.scores``; None is all that can rank in this schedule.

    Raises:
      UserError: nothing to compare at, a name of no score, and what ``answering.plan`` raises.
    """
    check_batch_size(batch_size + 1)  # one of the noises has larger batches
    config = model.config
    schedule = schedule or config.schedule
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
    settings += [other, Setting("controls", "no image", DropSchedule((0,), (0.0,), score="none"))]
    for setting in settings:  # before the first answer: a schedule that does not fit, a score that is none
        find_score(dataclasses.replace(config, schedule=setting.schedule))

    expected = _field(questions, ANSWER)
    clusters = [question.images[0] if question.images else question.id for question in questions]
    sampling = Sampling(max_new_tokens=max_new_tokens)
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
    rows += [(Setting("noise", name, DropSchedule.none()), effect) for name, effect in effects.items()]
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
    """Names of the scores that can rank in this schedule by themselves."""
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
    groups = plan(model.processor, questions, batch_size, sampling.max_new_tokens)
    for group, batch in zip(groups, read_batches(model.processor, questions, groups, batch_size), strict=True):
        if given is not None:
            batch = _with_scores(batch, [given[number] for number in group.questions])
        answer = generate_batch(model, batch, sampling)
        first = np.asarray(jax.nn.log_softmax(answer.first_logits))
        rows = zip(answer.texts, first, answer.kept, answer.image_tokens, strict=True)
        for number, row in zip(group.questions, rows, strict=False):  # a batch may be filled up
            found[number] = row
    texts, log_probs, kept, image_tokens = map(list, zip(*found, strict=True))
    return Answers(texts, np.stack(log_probs), kept, image_tokens)


def _noises(
    model: Model, questions: Sequence[Question], batch_size: int, asking: Callable[..., Answers]
) -> Iterator[tuple[str, Answers]]:
    """The dense ``model`` asked in ways that should not matter."""
    yield "nothing", asking(model, batch_size=batch_size + 1)
    dtype = jnp.bfloat16 if _dtype(model) == jnp.float32 else jnp.float32
    cast = dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(dtype), model.params))
    yield jnp.dtype(dtype).name, asking(cast)
    reworded = _field(questions, REWORDED)
    if reworded:
        asked = [dataclasses.replace(old, text=text) for old, text in zip(questions, reworded, strict=True)]
        yield "other words", asking(model, questions=asked)


def _field(questions: Sequence[Question], name: str) -> list[str] | None:
    """What all questions say under ``name``; None if one of them does not."""
    if not all(isinstance(question.fields.get(name), str) for question in questions):
        return None
    return [question.fields[name] for question in questions]


def stays_for_another(answers: Answers, clusters: Sequence[object]) -> list[list[np.ndarray]]:
    """[question][image] -> (n,) at how many drops each token stays for the next question that has as many tokens.

    Of the same picture if there is one. A question without such a neighbour is its own.
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
    """``batch`` with the scores [row][image] at its image tokens; rows that fill it up have zeros."""
    image_id = np.asarray(batch.image_id)
    scores = np.zeros(image_id.shape, np.float32)
    for row, images in enumerate(given):
        for number, values in enumerate(images, 1):
            scores[row, image_id[row] == number] = values
    return dataclasses.replace(batch, scores=scores)


def _dtype(model: Model) -> Any:
    return jax.tree.leaves(model.params)[0].dtype
