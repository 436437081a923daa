"""The answers of a study: asked setting by setting, kept in a journal, shared by processes.

A line of the journal is a ``StudyAnswer``. It compares an answer with the dense model's, whose distributions are too
large to keep: a run that goes on asks the dense model once more about the questions that it still needs.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field
from tqdm import tqdm

from pdrop_jax.analysis.metrics import EPS, jsd, kl
from pdrop_jax.analysis.settings import DENSE, TEMPERATURE, Setting, field
from pdrop_jax.batch import Batch
from pdrop_jax.errors import UserError
from pdrop_jax.eval.batching import Group, plan_batches, read_batches
from pdrop_jax.eval.evaluate import difference
from pdrop_jax.eval.journal import Journal
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.engine import generate_batch
from pdrop_jax.generation.pretrained import Model, reschedule
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.downsample import cuts_tiles
from pdrop_jax.inputs.images import measure
from pdrop_jax.model.quantization import is_quantized
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.schema import NO_OTHER_KEYS, validated

ANSWER = "answer"  # a field that a question file may have besides LLaVA's
HEADER = "study"  # ``answer_id`` of the first line of a journal
Numbered = list[tuple[int, Group]]  # batches with their numbers in the plan
Divergence = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclasses.dataclass(frozen=True)
class StudyAnswer:
    """One answer in one setting.

    Attributes:
      answer_id: numbers of the setting and of the question, see ``id_of``.
      text: the answer.
      kl, jsd: nats, divergences of the first new token's distribution from the dense model's.
      outcome: log-probability of the expected answer's first token; None without an expected answer.
      tokens: image tokens before the first drop.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    answer_id: str
    text: str
    kl: Divergence
    jsd: Divergence
    outcome: Annotated[float, Field(le=0, allow_inf_nan=False)] | None
    tokens: Annotated[int, Field(ge=0, le=2**30)]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the model said to one question.

    Attributes:
      first: (V,) float32, probabilities of the first new token.
      kept: [stage boundary][image] -> indices of the kept tokens.
      image_tokens: number of tokens of each image before the first drop.
    """

    text: str
    first: np.ndarray
    kept: list[list[list[int]]]
    image_tokens: list[int]


def id_of(setting: int, question: int) -> str:
    return f"{setting}.{question}"


def answer_settings(
    model: Model,
    questions: Sequence[Question],
    settings: Sequence[Setting],
    journal: Journal,
    metadata: Mapping[str, Any],
    *,
    batch_size: int,
    max_new_tokens: int,
    schedule: DropSchedule,
) -> list[list[StudyAnswer]] | None:
    """[setting][question] -> answer, once all are there; until then asks for those of this process.

    Args:
      journal: opened; its share says which batches are asked, in turn over all settings.
      metadata: everything that the answers depend on.
      schedule: of the tokens that another question keeps.

    Returns:
      None if other processes have not answered theirs yet, or have written the study already.

    Raises:
      UserError: the journal is that of another study, or a picture cannot be read.
    """
    ids = [[id_of(s, q) for q in range(len(questions))] for s in range(len(settings))]
    everything = [answer_id for of_setting in ids for answer_id in of_setting]
    _check_journal(journal, metadata, set(everything))
    plans = list(_plans(model, questions, settings, batch_size, max_new_tokens))
    todo = [
        [
            (n, group)
            for n, group in enumerate(plan)
            if s + n in journal.share and any(ids[s][question] not in journal.answers for question in group.questions)
        ]
        for s, plan in enumerate(plans)
    ]
    needed = {question for groups in todo for _, group in groups for question in group.questions}
    todo[0] = [(n, group) for n, group in enumerate(plans[0]) if needed & set(group.questions)]
    if needed and not any(record.get("answer_id") == HEADER for record in journal.read[journal.path]):
        journal.append([{"answer_id": HEADER, "metadata": dict(metadata)}])
    expected = _outcomes(model, questions)
    whole = reschedule(model, DENSE)
    dense: dict[int, np.ndarray] = {}
    with tqdm(settings, "settings", disable=None) as bar:
        for s, setting in enumerate(bar):
            bar.set_postfix_str(f"{setting.group}: {setting.name}")
            if not todo[s]:
                continue
            given = None
            if setting.schedule.score == "given":
                given = _given(model, schedule, questions, plans[0], todo[s], batch_size)
            rows, sampling = batch_size + setting.more_rows, sampling_of(setting, max_new_tokens)
            asking = ask(_set(model, whole, setting), setting.asked(questions), todo[s], rows, sampling, given, setting)
            for numbers, answers in asking:
                if not s:
                    dense |= {n: answer.first for n, answer in zip(numbers, answers, strict=True)}
                pairs = [pair for pair in zip(numbers, answers, strict=True) if ids[s][pair[0]] not in journal.answers]
                if pairs:
                    journal.append(_records(ids[s], pairs, dense, expected))
    missing = journal.missing(everything)
    _check_journal(journal, metadata, set(everything))  # what other processes have written since then
    if missing:
        return None
    return [[StudyAnswer(**journal.answers[answer_id]) for answer_id in row] for row in ids]


def sampling_of(setting: Setting, max_new_tokens: int) -> Sampling:
    if setting.seed is None:
        return Sampling(max_new_tokens)
    return Sampling(max_new_tokens, temperature=TEMPERATURE, seed=setting.seed * 2**16)  # batches take the seeds behind


def ask(
    model: Model,
    questions: Sequence[Question],
    groups: Numbered,
    batch_size: int,
    sampling: Sampling,
    given: Mapping[int, Sequence[np.ndarray]] | None = None,
    setting: Setting | None = None,
) -> Iterator[tuple[list[int], list[Asked]]]:
    """Yields (positions in ``questions``, answers) of each of ``groups``.

    Args:
      given: question -> [image] -> (n,) scores of the image's tokens, for the score "given".
    """
    tokens_of = setting.tokens_of if setting else None
    batches = read_batches(model.processor, questions, [group for _, group in groups], batch_size, tokens_of)
    for (number, group), batch in zip(groups, batches, strict=True):
        if given is not None:
            batch = _with_scores(batch, [given[question] for question in group.questions])
        found = generate_batch(model, batch, sampling if sampling.greedy else sampling.for_batch(number))
        first = np.asarray(jax.nn.softmax(found.first_logits))
        rows = zip(found.texts, first, found.kept, found.image_tokens, strict=True)
        yield group.questions, [Asked(*row) for row, _ in zip(rows, group.questions, strict=False)]


def donors(image_tokens: Sequence[Sequence[int]], clusters: Sequence[object]) -> list[int]:
    """For each question the next one whose images have as many tokens; one about the same image is preferred.

    A question without such a neighbour is its own.
    """
    count = len(image_tokens)

    def donor(n: int) -> int:
        alike = [i % count for i in range(n + 1, n + count) if image_tokens[i % count] == image_tokens[n]]
        return next((i for i in alike if clusters[i] == clusters[n]), alike[0] if alike else n)

    return [donor(n) for n in range(count)]


def depths(asked: Asked) -> list[np.ndarray]:
    """[image] -> (n,) number of drops that each token survived."""
    scores = [np.zeros(size, np.float32) for size in asked.image_tokens]
    for images in asked.kept:
        for image, tokens in zip(scores, images, strict=True):
            image[tokens] += 1
    return scores


def clusters_of(questions: Sequence[Question]) -> list[object]:
    """What questions are resampled by: their first image, or the question itself."""
    return [question.images[0] if question.images else question.id for question in questions]


def _given(
    model: Model,
    schedule: DropSchedule,
    questions: Sequence[Question],
    plan: Sequence[Group],
    todo: Numbered,
    rows: int,
) -> dict[int, list[np.ndarray]]:
    """The scores of the questions of ``todo``: how long their donor keeps each token."""
    processor = model.processor
    sizes = [
        [
            measure(image, processor.image_processor, processor.config, alone=len(question.images) == 1).tokens
            for image in question.images
        ]
        for question in questions
    ]
    donor = donors(sizes, clusters_of(questions))
    wanted = {donor[question] for _, group in todo for question in group.questions}
    groups = [(n, group) for n, group in enumerate(plan) if wanted & set(group.questions)]
    found: dict[int, list[np.ndarray]] = {}
    for numbers, answers in ask(reschedule(model, schedule), questions, groups, rows, Sampling(1)):
        found |= {n: depths(answer) for n, answer in zip(numbers, answers, strict=True)}
    return {question: found[donor[question]] for _, group in todo for question in group.questions}


def _plans(
    model: Model, questions: Sequence[Question], settings: Sequence[Setting], batch_size: int, max_new_tokens: int
) -> Iterator[list[Group]]:
    """The batches of each setting; most share those of the first."""
    first = plan_batches(model.processor, questions, batch_size, max_new_tokens)
    tiles = cuts_tiles(model.config)
    for setting in settings:
        if setting.rewordings is not None or setting.more_rows or (setting.tokens_of and tiles):
            rows = batch_size + setting.more_rows
            yield plan_batches(model.processor, setting.asked(questions), rows, max_new_tokens, setting.tokens_of)
        else:
            yield first


def _set(model: Model, whole: Model, setting: Setting) -> Model:
    """The model of a setting; ``whole`` is the dense one."""
    found = whole if setting.schedule == DENSE else reschedule(model, setting.schedule)
    if setting.dtype is None:
        return found
    dtype = jnp.dtype(setting.dtype)
    cast = jax.tree.map(lambda x: x if is_quantized(x) else x.astype(dtype), found.params, is_leaf=is_quantized)
    return dataclasses.replace(found, params=cast)


def _records(
    ids: Sequence[str],
    pairs: Sequence[tuple[int, Asked]],
    dense: Mapping[int, np.ndarray],
    expected: Sequence[int] | None,
) -> list[dict[str, Any]]:
    numbers, answers = zip(*pairs, strict=True)
    first, reference = np.stack([answer.first for answer in answers]), np.stack([dense[n] for n in numbers])
    divergences = zip(kl(reference, first).tolist(), jsd(reference, first).tolist(), strict=True)
    found = []
    for n, answer, (k, j) in zip(numbers, answers, divergences, strict=True):
        outcome = None if expected is None else float(np.log(np.clip(np.float64(answer.first[expected[n]]), EPS, 1)))
        tokens = sum(answer.image_tokens)
        # rounding can make a divergence of equal distributions a little negative
        found.append(dataclasses.asdict(StudyAnswer(ids[n], answer.text, max(k, 0.0), max(j, 0.0), outcome, tokens)))
    return found


def _outcomes(model: Model, questions: Sequence[Question]) -> list[int] | None:
    """The first token of each expected answer; None if a question has none."""
    answers = field(questions, ANSWER)
    if answers is None:
        return None
    ids = model.processor.tokenizer(answers, add_special_tokens=False).input_ids
    return [found[0] for found in ids] if all(ids) else None


def _check_journal(journal: Journal, metadata: Mapping[str, Any], known: set[str]) -> None:
    for path, records in journal.read.items():
        headers = [record.get("metadata") for record in records if record.get("answer_id") == HEADER]
        if records and not headers:
            raise UserError(f"{path} is not of a study: {_what_to_do(path)}")
        for theirs in headers:
            check_metadata(path, theirs, metadata)
        for number, record in enumerate(records, 1):
            if record.get("answer_id") == HEADER:
                continue
            answer = validated(StudyAnswer, record, f"{path} line {number}")
            if answer.answer_id not in known:
                raise UserError(f"{path} line {number}: there is no answer {answer.answer_id!r} in this study")


def check_metadata(path: pathlib.Path, theirs: Any, ours: Mapping[str, Any]) -> None:
    """Raises UserError unless ``theirs``, found in ``path``, is the metadata of this study."""
    found = difference(theirs if isinstance(theirs, dict) else {}, ours)
    if found:
        raise UserError(f"{path} is of a study of another {found}; {_what_to_do(path)}")


def _what_to_do(path: pathlib.Path) -> str:
    return f"name another file, --out FILE, or remove {path} to start again (--overwrite)"


def _with_scores(batch: Batch, given: Sequence[Sequence[np.ndarray]]) -> Batch:
    """``batch`` with the scores [row][image] at its image tokens; padding rows have zeros."""
    image_id = np.asarray(batch.image_id)
    scores = np.zeros(image_id.shape, np.float32)
    for row, images in enumerate(given):
        for number, values in enumerate(images, 1):
            scores[row, image_id[row] == number] = values
    return dataclasses.replace(batch, scores=scores)
