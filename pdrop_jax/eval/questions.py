"""Question files: LLaVA's JSON lines, and its JSON list of conversations (ScienceQA)."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.chat_template import IMAGE_TAG, without_tags
from pdrop_jax.inputs.images import Picture
from pdrop_jax.io import inside, parse_json, read_bytes, read_json
from pdrop_jax.paths import as_path, in_bucket, names_in

MOST_NAMES = 3  # in an error message


@dataclasses.dataclass(frozen=True)
class Question:
    """One question to a model.

    Attributes:
      id: usually unique. In LLaVA's TextVQA and MME files it is the image's name, shared by several questions.
      text: the question, with one ``<image>`` tag for each of ``images`` or without any.
      fields: all other fields of the file.
      where: location for error messages, such as "file line 3".
    """

    id: str | int
    text: str
    images: tuple[Picture, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""


def read_questions(
    path: str | os.PathLike, images: str | os.PathLike = "", outside_images: bool = False
) -> list[Question]:
    """Reads the questions of a file, in order.

    A line is ``{"question_id", "text", "image", …}``, where ``image`` is a file in the folder ``images``, a list of
    them, or absent. From a JSON list of ``{"id", "conversations", "image", …}`` the first question of each record is
    taken.

    Args:
      outside_images: whether an image may lie outside ``images``, such as ``../1.png``.

    Raises:
      UserError: the file or an image does not exist, a line is malformed, an id is repeated and is not the name of its
        image, an image lies outside its folder, or tags and images differ in number.
    """
    folder = as_path(images)
    questions = [_question(record, where, folder, outside_images) for where, record in _records(as_path(path))]
    if not questions:
        raise UserError(f"{path} holds no questions")
    seen: dict[str, Question] = {}
    for question in questions:
        first = seen.setdefault(str(question.id), question)
        if first is not question and not _names_its_picture(question):
            raise UserError(f"{question.where}: question_id {question.id!r} is that of {first.where} too")
    _check_pictures(questions)
    return questions


def read_lines(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a JSON-lines file; blank lines are skipped.

    Raises:
      UserError: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if line.strip():
            yield number, parse(line, f"{path} line {number}")


def parse(line: bytes, where: str) -> dict[str, Any]:
    """Parses the JSON object of one line.

    Raises:
      UserError: the line is not a JSON object.
    """
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise UserError(f"{where} is malformed: expected a JSON object, got {type(record).__name__}")
    return record


def value(record: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """``record[key]``.

    Raises:
      UserError: it is missing, or has none of the types ``kinds``.
    """
    if not isinstance(record, dict) or key not in record:
        raise UserError(f"{where} has no {key!r}")
    found = record[key]
    if not isinstance(found, kinds) or isinstance(found, bool):
        raise UserError(f"{where}: {key!r} is {json.dumps(found)[:60]}, which is not what is expected there")
    return found


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if read_bytes(path).lstrip()[:1] != b"[":
        yield from ((f"{path} line {number}", record) for number, record in read_lines(path))
        return
    for number, record in enumerate(read_json(path, list), 1):
        where = f"{path} record {number}"
        if not isinstance(record, dict):
            raise UserError(f"{where} is malformed: expected a JSON object, got {type(record).__name__}")
        yield where, {"question_id": value(record, "id", (str, int), where), **_asked(record, where)}


def _asked(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A conversation record with its first question as text, as in llava.eval.model_vqa_science."""
    first = (value(record, "conversations", list, where) or [None])[0]
    if not isinstance(first, dict):
        raise UserError(f"{where}: its conversation is empty")
    text = without_tags(value(first, "value", str, where)).strip()
    rest = {key: item for key, item in record.items() if key != "id"}
    return {**rest, "text": f"{IMAGE_TAG}\n{text}" if record.get("image") else text}


def _question(record: dict[str, Any], where: str, images: pathlib.Path, outside_images: bool) -> Question:
    fields = dict(record)
    question_id = value(fields, "question_id", (str, int), where)
    text = value(fields, "text", str, where)
    names = fields.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}: 'image' is neither the name of a file nor a list of such names")
    outside = [] if outside_images else [name for name in names if not inside(images, name)]
    if outside:
        raise UserError(
            f"{where}: the picture {outside[0]!r} lies outside the folder {images}: name another folder, --images DIR, "
            "or allow it with --outside-images"
        )
    tags = text.count(IMAGE_TAG)
    if tags not in (0, len(names)):
        raise UserError(
            f"{where}: question {question_id!r} has {tags} <image> tags but {len(names)} pictures: name one for each"
        )
    for key in ("question_id", "text", "image"):
        fields.pop(key, None)
    return Question(question_id, text, tuple(images / name for name in names), fields, where)


def _names_its_picture(question: Question) -> bool:
    names = [pathlib.Path(str(image)) for image in question.images[:1]]
    return any(pathlib.PurePosixPath(str(question.id)).name in (name.name, name.stem) for name in names)


def _check_pictures(questions: list[Question]) -> None:
    there: dict[str, bool] = {}
    names = functools.cache(names_in)
    missing = []
    for question in questions:
        for image in question.images:
            name = str(image)
            if name not in there:
                path = as_path(name)
                there[name] = path.name in names(path.parent) if in_bucket(path) else os.path.isfile(path)
            if not there[name]:
                missing.append(f"{name} of question {question.id!r}, {question.where}")
    if missing:
        more = f", and {len(missing) - MOST_NAMES} more" if len(missing) > MOST_NAMES else ""
        raise UserError(
            f"{len(missing)} pictures are not there: {'; '.join(missing[:MOST_NAMES])}{more}; "
            "name the folder they are in, --images DIR"
        )
