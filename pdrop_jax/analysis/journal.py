"""Answers on disk before all are there: none is lost to a kill, none stands twice."""

import fcntl
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from pdrop_jax.errors import UserError

from .questions import parse

Answer = dict[str, Any]  # a line of an answer file


class Journal:
    """The unfinished answers beside ``target``, held by one process at a time; a torn last line is cut off.

    Attributes:
      answers: by ``answer_id``, those that have been written.

    Raises:
      UserError: another process holds it, or a line is malformed.
    """

    def __init__(self, target: pathlib.Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".unfinished")
        self.answers: dict[str, Answer] = {}

    def __enter__(self) -> "Journal":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.answers:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def append(self, answers: Iterable[Answer]) -> None:
        """Writes answers through to the disk."""
        new = list(answers)
        self._file.write(b"".join(map(_encoded, new)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.answers |= {answer["answer_id"]: answer for answer in new}

    def finish(self, ids: Sequence[str]) -> None:
        """Writes all answers in the order of ``ids`` aside, and renames that to ``target``."""
        aside = self.target.with_name(self.target.name + ".ordered")
        with aside.open("wb") as file:
            file.writelines(_encoded(self.answers[answer_id]) for answer_id in ids)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.target)
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is being written by another process: wait for it") from None
        if self.target.exists():  # the other one finished between our look for the file and the lock
            raise UserError(f"{self.target} has just been finished by another process: run the same command again")

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            answer = parse(line, f"{self.path} line {number}")
            self.answers[str(answer.get("answer_id"))] = answer


def _encoded(answer: Answer) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
