"""Answer files: each question of a file is answered once, over any number of runs.

Answers are appended to ``A.jsonl.unfinished`` in the order in which they are generated. When all are there, they are
written in the order of the questions and renamed to ``A.jsonl``. Lines are in LLaVA's format::

    {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}

``metadata`` holds everything that answers depend on, see ``describe``. ``answer_id`` is a hash of it and of the
question, so a run resumes only from its own answers.
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
from pdrop_jax.config import CacheDtype, Implementation, LlavaConfig, Quantization
from pdrop_jax.convert.cache import model_folder
from pdrop_jax.errors import UserError, printable
from pdrop_jax.eval.batching import answer_all, check_batch_size
from pdrop_jax.eval.journal import AnswerRecord, Journal, remove_unfinished, unfinished
from pdrop_jax.eval.questions import Question, read_lines, read_questions
from pdrop_jax.eval.shares import Share
from pdrop_jax.generation.engine import check_implementation
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.io import check_output
from pdrop_jax.model.quantization import quantization_name
from pdrop_jax.paths import as_path, in_bucket
from pdrop_jax.schedule import DropSchedule

# Names of the keys of ``describe`` in messages.
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
    """Result of a run, or of the part of it that one process did.

    Attributes:
      out: the answer file.
      questions: number of questions in the file.
      answered: number of questions that this run answered; the others had been answered before.
      missing: number of questions that other processes have not answered yet; the last of them writes the file.
      seconds: duration of this run, including loading and compilation.
    """

    out: pathlib.Path
    questions: int
    answered: int
    missing: int
    seconds: float


def evaluate(
    model: str | os.PathLike,
    questions: str | os.PathLike,
    images: str | os.PathLike,
    out: str | os.PathLike,
    *,
    schedule: DropSchedule | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: Quantization | None = None,
    quantize_cache: CacheDtype | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 8,
    sampling: Sampling = Sampling(max_new_tokens=128),
    implementation: Implementation = "auto",
    verify: bool = True,
    outside_images: bool = False,
    overwrite: bool = False,
    share: Share = Share(),
) -> Evaluation:
    """Answers the questions of a file that an earlier, interrupted run has not answered.

    Greedy runs may be resumed with another batch size, mesh or attention implementation, and any run by another number
    of processes.

    Args:
      model: checkpoint folder or Hub id, see ``pdrop_jax.load``.
      questions: question file, see ``questions.read_questions``.
      images: folder of the images.
      out: a new file, or one that this function wrote before.
      schedule, dtype, quantize, quantize_cache, mesh, verify: see ``pdrop_jax.load``.
      sampling: answer length and sampling; the default is greedy decoding.
      outside_images: see ``questions.read_questions``.
      overwrite: delete existing answers, of whatever run, and start over; for one process only.
      share: which of several processes this is. Each answers its share; the last to finish writes ``out``.

    Raises:
      UserError: the questions, the model or an argument are invalid; ``out`` is an input or not a regular file, it
        holds answers of another model, schedule or question, or another process is writing it. Everything except an
        unreadable image or a question that is too long is found before the model is loaded.
    """
    began = time.perf_counter()
    check_implementation(implementation)
    check_batch_size(batch_size)
    asked = read_questions(questions, images, outside_images)
    inputs = [questions, *(image for question in asked for image in question.images), *([model] if overwrite else ())]
    target = check_output(out, overwrite=True, inputs=inputs, makes_folder=True)
    if not in_bucket(target):  # where it is a folder of objects
        check_output(unfinished(target, share), overwrite=True, inputs=inputs, makes_folder=True)
    folder = as_path(model_folder(model, dtype))
    quantized = quantization_name(quantize, quantize_cache)
    metadata = describe(folder, schedule, dtype, quantized, sampling, batch_size)
    ids = answer_ids(asked, metadata, images)
    if target.exists() and not overwrite:
        check_answers(target, [answer for _, answer in read_lines(target)], asked, ids, metadata, whole=True)
        remove_unfinished(target)  # left by a run that was killed right after renaming its answers
        return Evaluation(as_path(out), len(asked), 0, 0, time.perf_counter() - began)
    with Journal(target, overwrite, share) as journal:
        for path, answers in journal.read.items():
            check_answers(path, answers, asked, ids, metadata)
        answered = {n for n, answer_id in enumerate(ids) if answer_id in journal.answers}
        count = 0
        if len(answered) < len(asked):
            loaded = load(folder, schedule, dtype, mesh, quantize, verify, quantize_cache)
            bar = tqdm(total=len(asked), initial=len(answered), desc="answering", unit=" questions", disable=None)
            batches = answer_all(
                loaded,
                asked,
                batch_size=batch_size,
                sampling=sampling,
                implementation=implementation,
                answered=answered,
                share=share,
            )
            with bar, contextlib.closing(batches):
                for numbers, generation in batches:
                    new = [(n, text) for n, text in zip(numbers, generation.texts, strict=True) if n not in answered]
                    journal.append(_line(asked[n], text, ids[n], folder, metadata) for n, text in new)
                    count += len(new)
                    bar.update(len(new))
        missing = journal.finish(ids)
    return Evaluation(as_path(out), len(asked), count, missing, time.perf_counter() - began)


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
      UserError: ``folder`` is not a checkpoint, or the schedule does not fit it.
    """
    config = LlavaConfig.load(folder)
    schedule = dataclasses.replace(config, schedule=schedule or config.schedule).schedule
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
    """For each question a hash of everything its answer depends on; repeated questions are numbered.

    Args:
      images: image paths are hashed relative to this folder, so that it may be moved.
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
    """Raises UserError unless all answers are of this run; with ``whole`` all must be there."""
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
    """How ``answer`` differs from the answers of this run, whose question texts by id are ``texts``."""
    theirs = answer.get("metadata")
    found = difference(theirs if isinstance(theirs, dict) else {}, metadata)
    if found:
        return f"answers of another {found}"
    asked = f"an answer to question {answer.get('question_id')!r}"
    now = texts.get(str(answer.get("question_id")))
    if now is None:
        return f"{asked}, which is not in the file of questions"
    if answer.get("prompt") not in now:
        return f"{asked} when it read {_short(answer.get('prompt'))}, now it reads {_short(now[0])}"
    return f"{asked} about another picture"


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The first thing that two runs do not have in common, or None: "dtype: "float32", this run has "bfloat16" "."""
    for key, value in ours.items():
        if theirs.get(key) != value:
            return f"{LABELS.get(key, key)}: {_short(theirs.get(key))}, this run has {_short(value)}"
    return None


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
