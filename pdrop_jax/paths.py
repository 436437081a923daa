"""Paths, local (``pathlib``) or in a bucket (``etils.epath``): most of the project need not know which.

``as_path`` decides by the name. ``BucketPath`` has the methods of ``pathlib.Path`` that are used here. Whatever a
client library raises about a bucket, it turns into a UserError of one line; the libraries repeat failed requests, see
``RETRIES``.
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import pathlib
import posixpath
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from typing import Any, cast

from etils.epath.gpath import PosixGPath

from pdrop_jax.errors import UserError, one_line

_URL = re.compile(r"(gs|s3):/{1,2}([^/].*)?", re.DOTALL)  # one slash: pathlib makes gs:/b of gs://b
_KINDS = {  # scheme: name, client library, extra, how to get credentials
    "gs": (
        "Google Cloud Storage",
        "gcsfs",
        "gcs",
        "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to a key file",
    ),
    "s3": ("S3", "s3fs", "s3", "run aws configure, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
}
# Requests that fail (429, 5xx, a lost connection) are repeated with growing pauses, in all for about a minute: gcsfs
# and s3fs do so by default, and orbax's reads and writes are told to, see ``checkpoint.remote``.
RETRIES = 6


def as_path(path: str | os.PathLike) -> pathlib.Path:
    """The path that ``path`` names: in a bucket if it starts with gs:// or s3://, otherwise on the local disk.

    The result is a ``BucketPath`` in the first case. It is typed as the other, whose methods it has.

    Raises:
      UserError: the URL names no bucket, or the client library for it is not installed.
    """
    if isinstance(path, pathlib.Path | BucketPath) and not str(path).startswith(("gs:/", "s3:/")):
        return cast(pathlib.Path, path)
    text = os.fspath(path)
    found = _URL.match(text)
    if not found:
        return pathlib.Path(text)
    if not found[2]:
        raise UserError(f"{text} names no bucket: write {found[1]}://BUCKET/NAME")
    _prepare(found[1])
    return cast(pathlib.Path, BucketPath(f"{found[1]}://{posixpath.normpath(found[2])}"))


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether ``as_path(path)`` is in a bucket."""
    return _URL.match(os.fspath(path)) is not None


@functools.cache
def _prepare(scheme: str) -> None:
    name, library, extra, _ = _KINDS[scheme]
    if importlib.util.find_spec(library) is None:
        raise UserError(f"{scheme}:// paths ({name}) need {library}: pip install 'pdrop-jax[{extra}]'")
    # One client for everything: etils would use TensorFlow's where it happens to be installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec

    # A cached listing misses what another process, or orbax, has written since.
    for protocol in {"gs": ("gs", "gcs"), "s3": ("s3",)}[scheme]:
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    logging.getLogger(library).setLevel(logging.CRITICAL)  # it logs the traceback of every error that it raises


class BucketPath(PosixGPath):
    """A path of an object, or of a folder of objects, in a bucket.

    A folder exists as long as an object has its name as prefix. Writing one object is atomic.
    """

    @property
    def bucket(self) -> str:
        """URL of the bucket."""
        return "{1}://{2}".format(*self.parts)

    @property
    def parent(self) -> "BucketPath":
        """As for the root of a disk, that of a bucket is the bucket itself."""
        return super().parent if len(self.parts) > 3 else self

    @property
    def _fs(self) -> Any:
        import fsspec

        return fsspec.filesystem(self.parts[1])

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    def is_symlink(self) -> bool:
        return False

    def exists(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        return self.exists() and not self.is_dir()

    def is_dir(self) -> bool:
        try:
            return stat.S_ISDIR(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def stat(self) -> os.stat_result:
        """Kind and size as ``os.stat`` gives them. Raises FileNotFoundError as it does."""
        with _asking(self, "read"):
            found = self._fs.info(str(self))
        kind = stat.S_IFDIR if found["type"] == "directory" else stat.S_IFREG
        return os.stat_result((kind, 0, 0, 1, 0, 0, found["size"] or 0, 0, 0, 0))

    def iterdir(self) -> Iterator["BucketPath"]:
        with _asking(self, "read"):
            names = [name.rstrip("/") for name in self._fs.ls(str(self), detail=False)]
        here = str(self).partition("://")[2]  # some servers list an object for the folder itself
        yield from (self / posixpath.basename(name) for name in names if name != here)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """The objects and folders directly in this folder whose names match."""
        with contextlib.suppress(FileNotFoundError):
            yield from (path for path in self.iterdir() if path.match(pattern))

    def open(self, mode: str = "r", *args: Any, **options: Any) -> Any:
        """A file object for reading in parts."""
        with _asking(self, "read"):
            return self._fs.open(str(self), mode, *args, **options)

    def read_bytes(self) -> bytes:
        with _asking(self, "read"):
            return self._fs.cat_file(str(self))

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of the object."""
        with _asking(self, "read"):
            return self._fs.cat_file(str(self), start=start, end=stop)

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes, new: bool = False) -> int:
        """Writes the object; with ``new``, raises FileExistsError if there is one."""
        with _asking(self, "written"):
            self._fs.pipe_file(str(self), data, mode="create" if new else "overwrite")
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def upload(self, file: pathlib.Path, new: bool = False) -> None:
        """``write_bytes`` of a local file."""
        with _asking(self, "written"):
            self._fs.put_file(str(file), str(self), mode="create" if new else "overwrite")

    def download(self, file: pathlib.Path) -> None:
        with _asking(self, "read"):
            self._fs.get_file(str(self), str(file))

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Nothing: a folder comes into being with its first object."""

    def unlink(self, missing_ok: bool = False) -> None:
        with _asking(self, "removed"), contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
            self._fs.rm_file(str(self))

    def rmtree(self, missing_ok: bool = False) -> None:
        with _asking(self, "removed"), contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
            self._fs.rm(str(self), recursive=True)


def remove_folder(folder: pathlib.Path) -> None:
    """Removes a folder if it exists; in a bucket its config.json first, so that the rest is no checkpoint."""
    if isinstance(folder, BucketPath):
        (folder / "config.json").unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)
    else:
        for attempt in range(10):  # threads of a failed write may still create files in it
            time.sleep(0.1 if attempt else 0)
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.is_dir():
                return


def move_folder(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a folder; in a bucket, object by object."""
    if isinstance(folder, BucketPath):
        for name in files_below(cast(pathlib.Path, folder)):
            with _asking(folder, "moved"):
                folder._fs.cp_file(str(folder / name), str(target / name))  # on the server
        folder.rmtree()
    else:
        folder.rename(target)


def is_file(path: str | os.PathLike) -> bool:
    """Whether it is a file; False for names that cannot be one, such as too long ones."""
    return as_path(path).is_file() if in_bucket(path) else os.path.isfile(path)


def is_dir(path: str | os.PathLike) -> bool:
    """Whether it is a folder; False for names that cannot be one."""
    return as_path(path).is_dir() if in_bucket(path) else os.path.isdir(path)


def lexists(path: str | os.PathLike) -> bool:
    """Whether there is something of this name, be it a broken link."""
    return as_path(path).exists() if in_bucket(path) else os.path.lexists(path)


def names_in(folder: str | os.PathLike) -> frozenset[str]:
    """Names of the files and folders in ``folder``; empty if it does not exist."""
    try:
        return frozenset(path.name for path in as_path(folder).iterdir())
    except UserError:
        raise
    except (OSError, ValueError):
        return frozenset()


def files_below(folder: pathlib.Path) -> dict[str, int]:
    """Size in bytes of every file below ``folder``, by its path relative to it, sorted."""
    if isinstance(folder, BucketPath):
        with _asking(folder, "read"):
            found = folder._fs.find(str(folder), detail=True)
        start = len(str(folder).partition("://")[2]) + 1
        sizes = {name[start:]: info["size"] for name, info in found.items()}
    else:
        files = (path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return dict(sorted(sizes.items()))


@functools.cache  # once per folder
def probe(folder: pathlib.Path) -> None:
    """Writes and removes a small object in ``folder``, so that a missing permission is found before any work.

    Raises:
      UserError: the bucket does not exist, or must not be written.
    """
    trial = folder / f".pdrop-trial-{secrets.token_hex(8)}"
    trial.write_bytes(b"")
    trial.unlink()


def why_missing(path: pathlib.Path, what: str) -> str:
    """``what``, or that the bucket does not exist that ``path``, which was not found, should be in."""
    if in_bucket(path):
        place = cast(BucketPath, path)
        try:
            with _asking(place, "read"):
                place._fs.ls(place.bucket, detail=False)
        except FileNotFoundError:
            return _no_bucket(place)
    return what


def _no_bucket(path: BucketPath) -> str:
    return f"there is no bucket {path.bucket}"


@contextlib.contextmanager
def _asking(path: BucketPath, what: str) -> Iterator[None]:
    """Turns what a client library raises about ``path`` into a UserError, except that an object is (not) there."""
    try:
        yield
    except (UserError, FileExistsError):
        raise
    except FileNotFoundError:
        if what != "written":
            raise
        raise UserError(f"{path} cannot be written: {_no_bucket(path)}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # the disk of a local copy
            raise
        raise UserError(f"{path} cannot be {what}: {reason(path, error)}") from None


def reason(path: str | os.PathLike, error: Exception) -> str:
    """Why a request about ``path`` failed and what to do, in the words of one line."""
    scheme, _, rest = os.fspath(path).partition("://")
    name, _, _, credentials = _KINDS[scheme]
    text = one_line(error)
    kind = type(error).__name__
    code = str(getattr(error, "code", ""))
    if kind in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError") or "Anonymous" in text:
        return f"no credentials for {name} were found: {credentials}"
    if code == "401" or re.search(r"\b401\b", text) or kind in ("RefreshError", "TokenRetrievalError"):
        return f"{name} does not accept the credentials ({text[:100]}): {credentials}"
    if isinstance(error, PermissionError) or code == "403" or re.search(r"\b403\b|Forbidden", text):
        return f"{name} denies access to the bucket {rest.partition('/')[0]!r}: ask for permission to read and write it"
    return f"{name} does not answer as expected, also after {RETRIES} attempts ({kind}: {text[:120]}): try again later"
