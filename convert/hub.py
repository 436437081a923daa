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
from collections.abc import Iterable, Iterator

from pdrop_jax import checkpoint
from pdrop_jax.config import FORMAT
from pdrop_jax.convert.files import PROJECTOR, find_weights, index_of, part_names
from pdrop_jax.convert.hub_requests import ask
from pdrop_jax.errors import UserError
from pdrop_jax.io import read_json
from pdrop_jax.paths import as_path

CONFIG = "config.json"
_ID = re.compile(r"(?!.*(?:--|\.\.))(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.A)
_WEB_PAGE = re.compile(
    r"(?:hf:/+|(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/+)(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve|commit)/(?P<revision>[^/?#]+))?.*"
)


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
        return Location(os.fspath(name), as_path(name))
    repo, revision = found
    folder = _download(os.fspath(name), repo, revision, [CONFIG])
    return Location(os.fspath(name), folder, repo, revision)


@contextlib.contextmanager
def named_as_typed(location: Location) -> Iterator[None]:
    """Errors name the model as the user does, not by its folder in the Hub's cache."""
    try:
        yield
    except UserError as error:
        raise UserError(*(str(line).replace(str(location.folder), location.name) for line in error.args)) from None


def fetch_files(location: Location, patterns: Iterable[str] = checkpoint.COMPANIONS) -> pathlib.Path:
    """The folder with config.json and the files that match ``patterns``. UserError as ``locate``."""
    return _fetch(location, [CONFIG, *patterns])


def fetch_weights(location: Location) -> pathlib.Path:
    """The folder with the weights in one format, preferably safetensors. UserError as ``locate``."""
    if (repo := location.repo) is None:
        return location.folder
    from huggingface_hub import HfApi

    try:
        names = ask(location.name, lambda: HfApi().list_repo_files(repo, revision=location.commit))
    except UserError:  # without a network, what is in the cache may be enough
        names = [path.name for path in location.folder.iterdir()]
        if find_weights(names.__contains__) is None:
            raise
    weights = find_weights(names.__contains__)
    wanted = [PROJECTOR] if PROJECTOR in names else []
    if weights and index_of(weights) in names:
        wanted += part_names(_fetch(location, [index_of(weights)]), weights)
    elif weights:
        wanted.append(weights)
    return _fetch(location, wanted, bars=True) if wanted else location.folder


def fetch_all(location: Location) -> pathlib.Path:
    """The folder with all files. UserError as ``locate``."""
    return _fetch(location, None, bars=True)


def _fetch(location: Location, patterns: list[str] | None, bars: bool = False) -> pathlib.Path:
    if location.repo is None:
        return location.folder
    return _download(location.name, location.repo, location.commit, patterns, bars)


def _download(
    name: str, repo: str, revision: str | None, patterns: list[str] | None, bars: bool = False
) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    version = importlib.metadata.version("pdrop-jax")

    def request() -> str:
        return snapshot_download(
            repo, revision=revision, allow_patterns=patterns, library_name="pdrop-jax", library_version=version
        )

    return pathlib.Path(ask(name, request, bars=bars))
