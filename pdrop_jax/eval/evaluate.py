"""AnswerRecord files: the questions of a file answered one time each, over any number of runs.

Answers lie in ``A.jsonl.unfinished`` in the order in which they came; when the last is there they are written in the
order of the questions and renamed to ``A.jsonl``. A line is LLaVA's::

    {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}

``metadata`` says what the answers depend on, see ``describe``. ``answer_id`` is a hash of that and of the question: a
run goes on only with its own answers.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from jax.sharding import Mesh
from tqdm import tqdm

from pdrop_jax.checkpoint import fingerprint, storage
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError, printable
from pdrop_jax.eval.batching import answer_all, check_batch_size
from pdrop_jax.eval.journal import AnswerRecord, Journal, unfinished
from pdrop_jax.eval.questions import Question, read_lines, read_questions
from pdrop_jax.generation.engine import check_implementation
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.io import check_output
from pdrop_jax.model.attention import Implementation
from pdrop_jax.schedule import DropSchedule

# Keys of ``describe`` as messages name them.
LABELS = {
    "fingerprint": "model",
    "schedule": "schedule",
    "dtype": "dtype",
    "quantize": "quantization",
    "max_new_tokens": "max_new_tokens",
    "sampling": "sampling",
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a run did.

    Attributes:
      out: the answer file.
      questions: of the whole file.
      answered: by this run; the others had been answered before.
      seconds: of this run, loading and compilation included.
    """

    out: pathlib.Path
    questions: int
    answered: int
    seconds: float


def evaluate(
    model: str | os.PathLike,
    questions: str | os.PathLike,
    images: str | os.PathLike,
    out: str | os.PathLike,
    *,
    schedule: DropSchedule | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: Literal["int8"] | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 8,
    sampling: Sampling = Sampling(max_new_tokens=128),
    implementation: Implementation = "auto",
    verify: bool = True,
    outside_images: bool = False,
    overwrite: bool = False,
) -> Evaluation:
    """Answers every question of a file, or those that an earlier run of the same did not get to.

    Greedy answers may be resumed with another batch size, mesh or attention.

    Args:
      model: a checkpoint's folder.
      questions: see ``questions.read_questions``.
      images: the folder of their pictures.
      out: a new file, or one that this wrote before.
      schedule: None is the checkpoint's own; it, dtype, quantize, mesh and verify as in ``pdrop_jax.load``.
      sampling: answer length and sampling; the default is greedy decoding.
      outside_images: see ``questions.read_questions``.
      overwrite: start over: answers that are there are removed, whatever they are of.

    Raises:
      UserError: the questions, the model or the values are wrong; ``out`` is an input or no regular file, it holds
        answers of another model, schedule or question, or another process is writing it. All but an unreadable picture
        or a question that is too long is found before the model is loaded.
    """
    began = time.perf_counter()
    check_implementation(implementation)
    check_batch_size(batch_size)
    folder = pathlib.Path(model)
    asked = read_questions(questions, images, outside_images)
    inputs = [questions, *(image for question in asked for image in question.images), *([folder] if overwrite else ())]
    target = check_output(out, overwrite=True, inputs=inputs, makes_folder=True)
    check_output(unfinished(target), overwrite=True, inputs=inputs, makes_folder=True)
    metadata = describe(folder, schedule, dtype, quantize, sampling, batch_size)
    ids = answer_ids(asked, metadata, images)
    if target.exists() and not overwrite:
        check_answers(target, [answer for _, answer in read_lines(target)], asked, ids, metadata, whole=True)
        unfinished(target).unlink(missing_ok=True)  # of a run that was killed right after it had renamed its answers
        return Evaluation(pathlib.Path(out), len(asked), 0, time.perf_counter() - began)
    with Journal(target, overwrite) as journal:
        check_answers(journal.path, journal.answers.values(), asked, ids, metadata)
        answered = {n for n, answer_id in enumerate(ids) if answer_id in journal.answers}
        before = len(answered)
        if before < len(asked):
            loaded = load(folder, schedule, dtype, mesh, quantize, verify)
            bar = tqdm(total=len(asked), initial=before, desc="answering", unit=" questions", disable=None)
            batches = answer_all(
                loaded,
                asked,
                batch_size=batch_size,
                sampling=sampling,
                implementation=implementation,
                answered=answered,
            )
            with bar, contextlib.closing(batches):
                for numbers, generation in batches:
                    new = [(n, text) for n, text in zip(numbers, generation.texts, strict=True) if n not in answered]
                    journal.append(_line(asked[n], text, ids[n], folder, metadata) for n, text in new)
                    bar.update(len(new))
        journal.finish(ids)
    return Evaluation(pathlib.Path(out), len(asked), len(asked) - before, time.perf_counter() - began)


def describe(
    folder: pathlib.Path,
    schedule: DropSchedule | None,
    dtype: str | None,
    quantize: str | None,
    sampling: Sampling,
    batch_size: int,
) -> dict[str, Any]:
    """Everything that answers depend on besides the question, read without loading the model.

    "sampling" is None for greedy decoding. Otherwise it includes the batch size, since rows of a batch share a key.

    Raises:
      UserError: ``folder`` is no checkpoint, or the schedule does not fit it.
    """
    config = LlavaConfig.load(folder)
    schedule = schedule or config.schedule
    schedule.check(config.text.num_layers)
    samples = {**dataclasses.asdict(sampling), "batch_size": batch_size}
    del samples["max_new_tokens"]  # it has a key of its own
    return {
        "fingerprint": fingerprint(folder),
        "schedule": schedule.to_json(),
        "dtype": dtype or storage.stored(folder)["embed.embedding"].dtype.name,
        "quantize": quantize,
        "max_new_tokens": sampling.max_new_tokens,
        "sampling": None if sampling.greedy else samples,
    }


def answer_ids(questions: Sequence[Question], metadata: Mapping[str, Any], images: str | os.PathLike) -> list[str]:
    """A hash for each question of what its answer depends on; a question that stands repeatedly counts its times.

    Args:
      images: the folder that pictures are named from, so that it may be moved.
    """
    times: collections.Counter[str] = collections.Counter()
    ids = []
    for question in questions:
        pictures = [os.path.relpath(str(image), images or ".") for image in question.images]
        asked = json.dumps([question.id, question.text, pictures, metadata], sort_keys=True)
        content = f"{asked} {times[asked]}".encode()
        times[asked] += 1
        ids.append(hashlib.blake2b(content, digest_size=11).hexdigest())
    return ids


def check_answers(
    path: pathlib.Path,
    answers: Collection[AnswerRecord],
    questions: Sequence[Question],
    ids: Sequence[str],
    metadata: Mapping[str, Any],
    whole: bool = False,
) -> None:
    """Raises UserError unless every answer is one to ``questions`` under ``metadata``; ``whole``: and all are there."""
    what_to_do = f"name another file, --out FILE, or remove {path} to start again (--overwrite)"
    texts: dict[str, list[str]] = {}
    for question in questions:
        texts.setdefault(str(question.id), []).append(question.text)
    known = set(ids)
    for answer in answers:
        if str(answer.get("answer_id")) not in known:
            raise UserError(f"{path} holds {_difference(answer, texts, metadata)}; {what_to_do}")
    if whole and sorted(str(answer["answer_id"]) for answer in answers) != sorted(ids):
        raise UserError(f"{path} holds {len(answers)} answers to {len(ids)} questions; {what_to_do}")


def _difference(answer: AnswerRecord, texts: Mapping[str, Sequence[str]], metadata: Mapping[str, Any]) -> str:
    """What tells ``answer`` from those to questions of such ``texts`` by id under ``metadata``."""
    theirs = answer.get("metadata")
    theirs = theirs if isinstance(theirs, dict) else {}
    for key, ours in metadata.items():
        if theirs.get(key) != ours:
            return f"answers of another {LABELS[key]}: {_short(theirs.get(key))}, this run has {_short(ours)}"
    asked = f"an answer to question {answer.get('question_id')!r}"
    now = texts.get(str(answer.get("question_id")))
    if now is None:
        return f"{asked}, which is not in the file of questions"
    if answer.get("prompt") not in now:
        return f"{asked} when it read {_short(answer.get('prompt'))}, now it reads {_short(now[0])}"
    return f"{asked} about another picture"


def _line(
    question: Question, text: str, answer_id: str, folder: pathlib.Path, metadata: Mapping[str, Any]
) -> AnswerRecord:
    return {
        "question_id": question.id,
        "prompt": question.text,
        "text": text,
        "answer_id": answer_id,
        "model_id": printable(folder.resolve().name),
        "metadata": metadata,
    }


def _short(found: Any) -> str:
    text = json.dumps(found, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
