"""The file of a study: what its answers depend on, whether it is there already, and how it is written."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pdrop_jax.analysis.asking import check_metadata
from pdrop_jax.analysis.settings import StudyOptions
from pdrop_jax.analysis.study import Study
from pdrop_jax.errors import UserError
from pdrop_jax.eval.evaluate import answer_ids, describe
from pdrop_jax.eval.journal import remove_unfinished
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.io import check_output, read_json, write_file

METADATA = "metadata"


def describe_study(
    folder: pathlib.Path,
    questions: Sequence[Question],
    images: str | os.PathLike,
    options: StudyOptions,
    *,
    dtype: str | None,
    quantized: str | None,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Everything that a study depends on, read without loading the model of ``folder``.

    Raises:
      UserError: see ``evaluate.describe``.
    """
    common = describe(folder, options.schedule, dtype, quantized, Sampling(max_new_tokens), batch_size)
    fields = [dict(question.fields) for question in questions]
    paraphrases = options.paraphrases
    return common | {
        "question file": _hash([answer_ids(questions, {}, images), fields]),
        "batch size": batch_size,
        "set of single drops": {"layers": _listed(options.layers), "ratios": _listed(options.ratios)},
        "set of scores": _listed(options.scores),
        "set of edit sizes": _listed(options.edit_sizes),
        "paraphrase file": None if paraphrases is None else _hash({k: list(v) for k, v in paraphrases.items()}),
        "number of draws": options.draws,
    }


def is_finished(out: str | os.PathLike, metadata: Mapping[str, Any]) -> bool:
    """Whether ``out`` holds the study with ``metadata``.

    Raises:
      UserError: it is another file, or another study.
    """
    target = check_output(out, overwrite=True)
    if not target.exists():
        return False
    try:
        theirs = read_json(target).get(METADATA)
    except UserError:
        theirs = None
    if not isinstance(theirs, dict):
        check_output(out)  # raises that there is a file
    check_metadata(target, theirs, metadata)
    return True


def save_study(study: Study, metadata: Mapping[str, Any], out: str | os.PathLike, overwrite: bool) -> None:
    """Writes ``out``, and removes the answers beside it, of which it was made."""
    target = check_output(out, overwrite=overwrite)
    write_file(target, json.dumps(study.as_json() | {METADATA: metadata}, allow_nan=False) + "\n", overwrite)
    remove_unfinished(target)


def _listed(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=11).hexdigest()
