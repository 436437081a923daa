"""The answers of an unfinished run, next to its output: a kill loses none, and none is written twice."""

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
from pdrop_jax.io import aside, check_output, put_in_place
from pdrop_jax.paths import BucketPath, remove_folder

AnswerRecord = dict[str, Any]  # a line of an answer file


class Journal:
    """The unfinished answers next to ``target``, written by one process.

    Locally they are lines of a file, which is locked; a torn last line is ignored. In a bucket, where nothing can be
    appended to an object, they are a folder with an object for each batch.

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
        self._lines: _File | _Objects = _Objects(self.path) if isinstance(self.path, BucketPath) else _File(self.path)

    def __enter__(self) -> "Journal":
        self._lines.open()
        try:
            if self.overwrite:
                self.target.unlink(missing_ok=True)
                self._lines.clear()
            elif self.target.exists():  # another process finished between our check and the lock
                raise UserError(f"{self.target} has just been finished by another process: run the same command again")
            for number, line in enumerate(self._lines.read().split(b"\n")[:-1], 1):
                answer = parse(line, f"{self.path} line {number}")
                self.answers[str(answer.get("answer_id"))] = answer
        except BaseException:
            self._lines.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._lines.close()

    def append(self, answers: Iterable[AnswerRecord]) -> None:
        """Writes answers, which a kill or a power failure afterwards does not lose."""
        new = list(answers)
        if new:
            self._lines.append(b"".join(map(_encoded, new)))
        self.answers |= {answer["answer_id"]: answer for answer in new}

    def finish(self, ids: Sequence[str]) -> None:
        """Writes all answers in the order of ``ids`` to ``target``, whole or not at all."""
        with aside(self.target) as new:
            with new.open("wb") as file:
                file.writelines(_encoded(self.answers[answer_id]) for answer_id in ids)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(new, self.target, overwrite=False)
        remove_unfinished(self.target)


class _File:
    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def open(self) -> None:
        folders = (self._path.parent, *self._path.parent.parents)
        self._made = list(itertools.takewhile(lambda folder: not folder.exists(), folders))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = check_output(self._path, overwrite=True).open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self._path} is being written by another process: wait for it") from None

    def clear(self) -> None:
        self._file.truncate(0)

    def read(self) -> bytes:
        """Whole lines."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._size = len(whole)
        return whole

    def append(self, content: bytes) -> None:
        """Writes and syncs ``content``, replacing a torn last line."""
        self._file.truncate(self._size)
        try:
            at = 0
            while at < len(content):
                at += self._file.write(content[at:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._size)
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._size += len(content)

    def close(self) -> None:
        """Removes the file if it is empty."""
        if not os.fstat(self._file.fileno()).st_size:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another process may have put a file there
                for folder in self._made:
                    folder.rmdir()
        self._file.close()


class _Objects:
    def __init__(self, folder: BucketPath) -> None:
        self._folder = folder
        self._count = 0

    def open(self) -> None:
        pass

    def clear(self) -> None:
        self._folder.rmtree(missing_ok=True)

    def read(self) -> bytes:
        found = sorted(self._folder.iterdir(), key=lambda path: path.name) if self._folder.is_dir() else []
        self._count = len(found)
        return b"".join(path.read_bytes() for path in found)

    def append(self, content: bytes) -> None:
        try:
            (self._folder / f"{self._count:08}.jsonl").write_bytes(content, new=True)
        except FileExistsError:
            raise UserError(f"{self._folder} is being written by another process: wait for it") from None
        self._count += 1

    def close(self) -> None:
        pass


def unfinished(target: pathlib.Path) -> pathlib.Path:
    """Path of the answers until all are there."""
    return target.with_name(target.name + ".unfinished")


def remove_unfinished(target: pathlib.Path) -> None:
    """Removes the answers at ``unfinished(target)``, if there are any."""
    path = unfinished(target)
    if isinstance(path, BucketPath):
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


def _encoded(answer: AnswerRecord) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
