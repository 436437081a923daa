"""Models on the Hugging Face Hub: what a user names becomes a folder, with the files that a conversion reads.

huggingface_hub does the work, so its cache, progress bars and environment variables apply (HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE).
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pdrop_jax import checkpoint
from pdrop_jax.config import FORMAT
from pdrop_jax.convert.files import PROJECTOR, find_weights, index_of, part_names
from pdrop_jax.errors import UserError
from pdrop_jax.io import read_json

CONFIG = "config.json"
DOWNLOADED = "downloaded"
ATTEMPTS = 4  # of a request that failed for a passing reason; the client itself repeats some kinds of them
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP status
PASSING_ERRORS = ("ReadError", "ReadTimeout", "RemoteProtocolError", "WriteError", "WriteTimeout")  # of httpx
_ID = re.compile(r"(?!.*(?:--|\.\.))(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.A)
_WEB_PAGE = re.compile(
    r"(?:hf:/+|(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/+)(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve|commit)/(?P<revision>[^/?#]+))?.*"
)
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Location:
    """Where the files of a model are.

    Attributes:
      name: as the user typed it.
      folder: the user's own, or a snapshot in the Hub's cache that holds the files fetched so far.
      repo: "owner/name" on the Hub; None for a folder of the user.
      revision: the branch, tag or commit hash that was asked for; None is the main branch.
    """

    name: str
    folder: pathlib.Path
    repo: str | None = None
    revision: str | None = None

    @property
    def commit(self) -> str | None:
        """Hash of the commit on the Hub."""
        return self.folder.name if self.repo else None

    @property
    def converted(self) -> bool:
        """Whether these are the files of a converted model, not of a PyTorch checkpoint."""
        path = self.folder / CONFIG
        return path.is_file() and read_json(path).get("format") == FORMAT


def hub_id(name: str | os.PathLike) -> tuple[str, str | None] | None:
    """Repository and revision of an id, ``owner/name[@revision]``; None if ``name`` is a path.

    A file or folder of that name wins, and a name with ``://`` is no id.

    Raises:
      UserError: ``name`` is the address of a model's web page.
    """
    text = os.fspath(name)
    if os.path.lexists(text):
        return None
    if page := _WEB_PAGE.fullmatch(text):
        revision = f"@{page['revision']}" if page["revision"] not in (None, "main") else ""
        raise UserError(f"{text} is the address of a web page: name the model itself, {page['repo']}{revision}")
    found = _ID.fullmatch(text)
    return (found["repo"], found["revision"]) if found else None


def locate(name: str | os.PathLike) -> Location:
    """Finds out what ``name`` is: a folder, or an id on the Hub, of which only config.json is downloaded.

    Raises:
      UserError: the model is not on the Hub or cannot be downloaded.
    """
    found = hub_id(name)
    if found is None:
        return Location(os.fspath(name), pathlib.Path(name))
    repo, revision = found
    folder = _download(os.fspath(name), repo, revision, [CONFIG])
    return Location(os.fspath(name), folder, repo, revision)


def fetch_files(location: Location, patterns: Iterable[str] = checkpoint.COMPANIONS) -> pathlib.Path:
    """The folder with config.json and the files that match ``patterns``. UserError as ``locate``."""
    return _fetch(location, [CONFIG, *patterns])


def fetch_weights(location: Location) -> pathlib.Path:
    """The folder with the weights in one format, preferably safetensors. UserError as ``locate``."""
    if location.repo is None:
        return location.folder
    names = _list_files(location)
    weights = find_weights(names.__contains__)
    wanted = [PROJECTOR] if PROJECTOR in names else []
    if weights and index_of(weights) in names:
        folder = _fetch(location, [index_of(weights)])
        wanted += part_names(folder, weights)
    elif weights:
        wanted.append(weights)
    return _fetch(location, wanted) if wanted else location.folder


def fetch_all(location: Location) -> pathlib.Path:
    """The folder with all files. UserError as ``locate``."""
    return _fetch(location, None)


def _fetch(location: Location, patterns: list[str] | None) -> pathlib.Path:
    if location.repo is None:
        return location.folder
    return _download(location.name, location.repo, location.commit, patterns)


def _download(name: str, repo: str, revision: str | None, patterns: list[str] | None) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    version = importlib.metadata.version("pdrop-jax")
    return pathlib.Path(
        ask(
            name,
            lambda: snapshot_download(
                repo, revision=revision, allow_patterns=patterns, library_name="pdrop-jax", library_version=version
            ),
        )
    )


def _list_files(location: Location) -> list[str]:
    """Names of all files of the repository, or without a network of those that are in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    def listed() -> list[str]:
        try:
            return HfApi().list_repo_files(str(location.repo), revision=location.commit)
        except OfflineModeIsEnabled:
            return [path.name for path in location.folder.iterdir()]

    return ask(location.name, listed)


def ask(name: str, request: Callable[[], Result], doing: str = DOWNLOADED) -> Result:
    """The result of ``request``, a call of huggingface_hub, repeated if it fails for a passing reason.

    Args:
      name: the model, for messages.
      doing: what could not be done to it, likewise.

    Raises:
      UserError: whatever went wrong, in one line with what to do.
      OSError: the disk is full or not writable.
    """
    for attempt in range(ATTEMPTS):
        try:
            with _quiet():
                return request()
        except Exception as error:  # the client raises exceptions of many libraries
            if isinstance(error, OSError) and error.errno:
                raise
            cause = _cause_of(error)
            if attempt == ATTEMPTS - 1 or not _passes(cause):
                raise UserError(_reason(name, cause, doing)) from error
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a terminal, keeps the client from drawing progress bars and from logging what ``ask`` reports in a line.

    On a terminal it may also say that it waits before it tries again.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    if sys.stderr.isatty():
        yield
        return
    level, bars = logging.get_verbosity(), constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    bars = bars and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()


def _cause_of(error: Exception) -> Exception:
    """The error that the client's "not found locally" or "upload failed" stands for."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError | RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _passes(error: Exception) -> bool:
    """Whether it may work a moment later."""
    if (status := _status(error)) is not None:
        return status in PASSING
    return type(error).__name__ in PASSING_ERRORS or "Consistency check failed" in str(error)


def _reason(name: str, error: Exception, doing: str) -> str:
    """One line for the user."""
    from huggingface_hub import constants, errors

    hub, repo, status = constants.ENDPOINT, name.partition("@")[0], _status(error)
    failed = f"{name} is not a folder here, and cannot be" if doing == DOWNLOADED else f"{name} cannot be"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return (
            f"{name} is neither a folder here nor complete in the Hub's cache, {constants.HF_HUB_CACHE}, and downloads "
            "are switched off: unset HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {hub}/{repo}, then {log_in} of that account"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: {repo} has no such revision; name a branch, a tag or a whole commit hash of {hub}/{repo}"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"{name} is neither a folder here nor a model that {hub} shows you: if it is private, {log_in}"
    if status == 403:
        return f"{failed} {doing}: {hub} denies access; {log_in} of an account that may do this"
    if status is not None:
        return f"{failed} {doing}: {hub} answers with status {status}; try again later"
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError"):
        return f"{failed} {doing}: {hub} cannot be reached ({_line(error)}); check the network and HF_ENDPOINT"
    return f"{failed} {doing}: {_line(error)}; run the command again to continue"


def _line(error: Any) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return text or type(error).__name__
