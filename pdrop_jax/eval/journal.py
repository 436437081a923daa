"""The answers of an unfinished run on disk: a kill loses none, and none is written twice."""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import parse
from pdrop_jax.io import check_output, put_in_place

AnswerRecord = dict[str, Any]  # a line of an answer file


class Journal:
    """The file of unfinished answers next to ``target``, locked by one process; a torn last line is ignored.

    Args:
      overwrite: start over, deleting earlier answers, finished or not.

    Attributes:
      answers: the answers written so far, by ``answer_id``.

    Raises:
      UserError: another process holds it, or a line is malformed.
    """

    def __init__(self, target: pathlib.Path, overwrite: bool = False) -> None:
        self.target = target
        self.path = unfinished(target)
        self.overwrite = overwrite
        self.answers: dict[str, AnswerRecord] = {}

    def __enter__(self) -> "Journal":
        folders = (self.target.parent, *self.target.parent.parents)
        self._made = list(itertools.takewhile(lambda folder: not folder.exists(), folders))
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._file = check_output(self.path, overwrite=True).open("a+b", buffering=0)
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another process may have put a file there
                for folder in self._made:
                    folder.rmdir()
        self._file.close()

    def append(self, answers: Iterable[AnswerRecord]) -> None:
        """Writes answers and syncs them to disk, replacing a torn last line."""
        new = list(answers)
        content = b"".join(map(_encoded, new))
        self._file.truncate(self._size)
        try:
            at = 0
            while at < len(content):
                at += self._file.write(content[at:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._size += len(content)
        self.answers |= {answer["answer_id"]: answer for answer in new}

    def finish(self, ids: Sequence[str]) -> None:
        """Writes all answers in the order of ``ids`` to a temporary file and renames it to ``target``."""
        aside = self.target.with_name(self.target.name + ".ordered")  # one name suffices: the lock is held
        try:
            with aside.open("wb") as file:
                file.writelines(_encoded(self.answers[answer_id]) for answer_id in ids)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(aside, self.target, overwrite=False)
        finally:
            aside.unlink(missing_ok=True)
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is being written by another process: wait for it") from None
        if self.overwrite:
            self.target.unlink(missing_ok=True)
            self._file.truncate(0)
        elif self.target.exists():  # another process finished between our check and the lock
            raise UserError(f"{self.target} has just been finished by another process: run the same command again")

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._size = len(whole)
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            answer = parse(line, f"{self.path} line {number}")
            self.answers[str(answer.get("answer_id"))] = answer


def unfinished(target: pathlib.Path) -> pathlib.Path:
    """Path of the answers until all are there."""
    return target.with_name(target.name + ".unfinished")


def _encoded(answer: AnswerRecord) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
