"""The answers of an unfinished run, next to its output: a kill loses none, and none is written twice.

Each of several processes has a journal of its own, ``A.jsonl.unfinished``, ``A.jsonl.unfinished-1``, …, and reads those
of the others. The process that finds all answers there joins them.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import parse
from pdrop_jax.eval.shares import Share
from pdrop_jax.io import aside, check_output, put_in_place, read_bytes
from pdrop_jax.paths import BucketPath, names_in, remove_folder

AnswerRecord = dict[str, Any]  # a line of an answer file


class Journal:
    """The unfinished answers next to ``target``.

    Locally they are lines of a file, which the process that writes it locks; a torn last line is ignored. In a bucket,
    where nothing can be appended to an object, they are a folder with an object for each batch.

    Args:
      overwrite: start over, deleting earlier answers, finished or not.
      share: which of several processes this one is.

    Attributes:
      answers: the answers of all processes, by ``answer_id``: when it was opened, and its own since then.
      read: the answers that were read from each file.

    Raises:
      UserError: another process holds it, a line is malformed, or several processes are to start over.
    """

    def __init__(self, target: pathlib.Path, overwrite: bool = False, share: Share = Share()) -> None:
        if overwrite and share.count > 1:
            raise UserError(
                f"--overwrite would delete what other processes have written: remove {target} and "
                f"{unfinished(target)}* before you start them"
            )
        self.target = target
        self.path = unfinished(target, share)
        self.overwrite = overwrite
        self.share = share
        self.answers: dict[str, AnswerRecord] = {}
        self.read: dict[pathlib.Path, list[AnswerRecord]] = {}
        self._lines: _File | _Objects = _Objects(self.path) if isinstance(self.path, BucketPath) else _File(self.path)

    def __enter__(self) -> "Journal":
        self._lines.open()
        try:
            if self.overwrite:
                self.target.unlink(missing_ok=True)
                self._lines.clear()
                remove_unfinished(self.target, but=self.path)
            elif self.target.exists():  # another process finished between our check and the lock
                raise UserError(f"{self.target} has just been finished by another process: run the same command again")
            self._take(self.path, self._lines.read())
            self._read_others()
        except BaseException:
            self._lines.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._lines.close()

    def _read_others(self) -> None:
        for path in _parts(self.target):
            if path != self.path:
                self._take(path, _content(path))

    def _take(self, path: pathlib.Path, content: bytes) -> None:
        lines = enumerate(content.split(b"\n")[:-1], 1)
        self.read[path] = [parse(line, f"{path} line {number}") for number, line in lines]
        self.answers |= {str(answer.get("answer_id")): answer for answer in self.read[path]}

    def append(self, answers: Iterable[AnswerRecord]) -> None:
        """Writes answers, which a kill or a power failure afterwards does not lose."""
        new = list(answers)
        if new:
            self._lines.append(b"".join(map(_encoded, new)))
        self.answers |= {answer["answer_id"]: answer for answer in new}

    def missing(self, ids: Iterable[str]) -> int:
        """How many of ``ids`` no process has answered yet."""
        if self.share.count > 1:
            self._read_others()
        return sum(answer_id not in self.answers for answer_id in ids)

    def finish(self, ids: Sequence[str]) -> int:
        """Writes all answers in the order of ``ids`` to ``target``, whole or not at all, once no process misses any.

        Returns:
          how many are missing.
        """
        missing = self.missing(ids)
        if self.share.count > 1 and self.target.exists():  # another process has joined them
            return 0
        if missing:
            return missing
        with aside(self.target) as new:
            with new.open("wb") as file:
                file.writelines(_encoded(self.answers[answer_id]) for answer_id in ids)
                file.flush()
                os.fsync(file.fileno())
            # Two processes may finish at once, with the same bytes.
            put_in_place(new, self.target, overwrite=self.share.count > 1)
        remove_unfinished(self.target)
        return 0


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


def unfinished(target: pathlib.Path, share: Share = Share()) -> pathlib.Path:
    """Path of a process's answers until all are there."""
    return target.with_name(f"{target.name}.unfinished{f'-{share.index}' if share.index else ''}")


def _parts(target: pathlib.Path) -> list[pathlib.Path]:
    """Paths of the unfinished answers of all processes."""
    name = re.compile(re.escape(unfinished(target).name) + "(-[1-9][0-9]*)?")
    return [target.with_name(found) for found in sorted(names_in(target.parent)) if name.fullmatch(found)]


def _content(path: pathlib.Path) -> bytes:
    """Whole lines of another process; none if it has been removed, because all answers are there."""
    try:
        content = _Objects(path).read() if isinstance(path, BucketPath) else read_bytes(path)
    except (UserError, FileNotFoundError):
        if path.exists():
            raise
        return b""
    return content[: content.rfind(b"\n") + 1]


def remove_unfinished(target: pathlib.Path, but: pathlib.Path | None = None) -> None:
    """Removes the unfinished answers of all processes, except those at ``but``."""
    for path in _parts(target):
        if path == but:
            continue
        if isinstance(path, BucketPath):
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)


def _encoded(answer: AnswerRecord) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
