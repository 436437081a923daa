"""The ways in which a study asks all questions; every one is compared with the dense model.

- one drop: a single drop at each layer and ratio (figure 1 of the paper);
- scores: other scoring functions, at the same numbers of tokens;
- controls: the tokens that another question would keep, the picture downsampled to as many tokens, and no image at all;
- noise: perturbations that have nothing to do with dropping: another batch size, the other dtype, the question in other
  words, and answers that are sampled. An effect that is no larger than these is negligible.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from pdrop_jax.analysis.cost import layer_tokens
from pdrop_jax.analysis.paraphrases import Rewording, matched, templates
from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.model.scores import SCORES, find_score
from pdrop_jax.schedule import DropSchedule

REWORDED = "reworded"  # a field that a question file may have besides LLaVA's
TEMPERATURE = 0.7  # of sampled answers, as in arXiv 2605.01048
DENSE = DropSchedule.none()


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to ask all questions.

    Attributes:
      group: "dense", "one drop", "scores", "controls", "noise" or "draws".
      name: name within the group.
      schedule: drop schedule.
      rewordings: the questions in other words, in their order; None is the questions themselves.
      dosed: whether these have a wanted edit size.
      dtype: of the parameters; None is the model's.
      more_rows: rows of a batch beyond the study's batch size.
      seed: of sampled answers; None is greedy decoding.
      tokens_of: how many tokens an image is downsampled to; None is all.
    """

    group: str
    name: str
    schedule: DropSchedule
    rewordings: tuple[Rewording, ...] | None = None
    dosed: bool = False
    dtype: str | None = None
    more_rows: int = 0
    seed: int | None = None
    tokens_of: Callable[[int], int] | None = None

    def asked(self, questions: Sequence[Question]) -> Sequence[Question]:
        """``questions`` in the words of this setting."""
        if self.rewordings is None:
            return questions
        pairs = zip(questions, self.rewordings, strict=True)
        return [dataclasses.replace(question, text=new.text) for question, new in pairs]


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """What a study asks.

    Attributes:
      schedule: schedule at which scores and controls are compared; None is the model's own.
      layers: layers of the single drops, which use the score "pyramiddrop"; None is all.
      ratios: ratios of the single drops.
      scores: names in ``model.scores``; None is all that work with this schedule.
      edit_sizes: sizes of the rewordings that are compared, in percent of the question's tokens.
      paraphrases: rewordings to choose from, by ``str`` of the question's id; None is ``paraphrases.templates``.
      draws: how often every question is answered with sampling.

    Raises:
      UserError: an edit size or the number of draws is out of range.
    """

    schedule: DropSchedule | None = None
    layers: Sequence[int] | None = None
    ratios: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 1.0)
    scores: Sequence[str] | None = None
    edit_sizes: Sequence[float] = ()
    paraphrases: Mapping[str, Sequence[str]] | None = None
    draws: int = 0

    def __post_init__(self) -> None:
        if any(not 0 < size <= 1000 for size in self.edit_sizes):
            raise UserError(f"edit sizes are percentages above 0 and up to 1000, got {list(self.edit_sizes)}")
        if not 0 <= self.draws <= 1000:
            raise UserError(f"the number of draws must be in 0..1000, got {self.draws}")


def study_schedule(model: Model, options: StudyOptions) -> DropSchedule:
    """The schedule at which scores and controls are compared.

    Raises:
      UserError: it drops nothing, or does not fit the decoder.
    """
    schedule = dataclasses.replace(model.config, schedule=options.schedule or model.config.schedule).schedule
    if not schedule.layers:
        raise UserError("the schedule drops nothing, so there is nothing to study: give one that does")
    return schedule


def make_settings(model: Model, questions: Sequence[Question], options: StudyOptions) -> list[Setting]:
    """All settings of a study; the first is the dense model's.

    Raises:
      UserError: the schedule drops nothing, or a score is unknown or does not fit.
    """
    schedule, config = study_schedule(model, options), model.config
    layers = range(config.text.num_layers) if options.layers is None else options.layers
    found = [Setting("dense", "dense", DENSE)]
    found += [
        Setting("one drop", f"layer {layer}, ratio {ratio:g}", DropSchedule((layer,), (ratio,), schedule.positions))
        for layer in layers
        for ratio in options.ratios
    ]
    names = possible_scores(model, schedule) if options.scores is None else options.scores
    found += [Setting("scores", name, dataclasses.replace(schedule, score=name)) for name in names]
    found.append(Setting("controls", "another question's tokens", dataclasses.replace(schedule, score="given")))

    def average(n: int) -> int:
        return max(1, layer_tokens(config.text, schedule, n) // config.text.num_layers)

    found.append(Setting("controls", "picture downsampled", DENSE, tokens_of=average))
    found.append(Setting("controls", "no image", DropSchedule((0,), (0.0,), schedule.positions, "none")))
    for setting in found:  # fail before the first answer
        find_score(dataclasses.replace(config, schedule=setting.schedule))
    return [*found, *_noises(model, questions, options)]


def _noises(model: Model, questions: Sequence[Question], options: StudyOptions) -> list[Setting]:
    """Perturbations of the dense model that should not matter."""
    dtype = "bfloat16" if dtype_of(model) == jnp.float32 else "float32"
    found = [Setting("noise", "nothing", DENSE, more_rows=1), Setting("noise", dtype, DENSE, dtype=dtype)]
    found += _rewordings(model, questions, options)
    return [*found, *(Setting("draws", f"draw {n}", DENSE, seed=n) for n in range(1, options.draws + 1))]


def _rewordings(model: Model, questions: Sequence[Question], options: StudyOptions) -> list[Setting]:
    """The questions in other words; of sizes for which the same rewordings are the closest, the first."""

    def encode(texts: list[str]) -> list[list[int]]:
        return model.processor.tokenizer(texts, add_special_tokens=False).input_ids

    found: list[Setting] = []
    theirs, sizes = field(questions, REWORDED), sorted(options.edit_sizes)
    if theirs is not None:
        (words,) = matched(questions, [[text] for text in theirs], [0.0], encode)
        found.append(Setting("noise", "other words", DENSE, rewordings=tuple(words)))
    if not sizes:
        return found
    own = options.paraphrases
    candidates = [templates(question.text) if own is None else own[str(question.id)] for question in questions]
    seen: list[list[Rewording]] = []
    for size, words in zip(sizes, matched(questions, candidates, sizes, encode), strict=True):
        if words not in seen:
            found.append(Setting("noise", f"reworded by {size:g} %", DENSE, rewordings=tuple(words), dosed=True))
        seen.append(words)
    return found


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


def field(questions: Sequence[Question], name: str) -> list[str] | None:
    """The field ``name`` of every question; None if a question does not have it."""
    if not all(isinstance(question.fields.get(name), str) for question in questions):
        return None
    return [question.fields[name] for question in questions]


def dtype_of(model: Model) -> jnp.dtype:
    return jax.tree.leaves(model.params)[0].dtype
