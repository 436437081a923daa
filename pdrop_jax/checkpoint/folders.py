"""Folders that appear complete or not at all, and the files that accompany a model."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator

import jax
from jax.experimental import multihost_utils

from pdrop_jax.errors import UserError
from pdrop_jax.io import UNFINISHED, check_file, check_new_folder, read_bytes
from pdrop_jax.paths import as_path, in_bucket, remove_folder

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
PROCESSOR = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
COMPANIONS = TOKENIZER + PROCESSOR


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike, nbytes: int) -> Iterator[pathlib.Path]:
    """A folder to write into that becomes ``folder`` at the end, or is removed if anything is raised.

    On the local disk it is ``folder`` + ".unfinished", which is renamed at the end. A bucket cannot rename, so it is
    ``folder`` itself, with the object ``UNFINISHED`` in it until the end. Callers write config.json last, without
    which nobody takes the folder for a checkpoint. What a killed process leaves, the next run removes. With several
    processes the first one begins and ends, and the others wait.

    Args:
      nbytes: approximate size of what is going to be written.

    Raises:
      UserError: ``folder`` exists, or the disk has less than ``nbytes`` free.
    """
    folder = as_path(folder).absolute()
    check_new_folder(folder)
    remote = in_bucket(folder)
    new = folder if remote else folder.with_name(folder.name + ".unfinished")
    if not remote:
        place = next(parent for parent in new.parents if parent.exists())
        free = shutil.disk_usage(place).free
        if free < nbytes:
            raise UserError(f"{folder} needs {nbytes / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB free")
    first = jax.process_index() == 0
    try:
        if first:
            remove_folder(new)
            new.mkdir(parents=True)
            if remote:
                (new / UNFINISHED).write_bytes(b"")
        multihost_utils.sync_global_devices(f"{new} is made")
        yield new
        multihost_utils.sync_global_devices(f"{new} is written")
        if first:
            (new / UNFINISHED).unlink() if remote else new.rename(folder)
        multihost_utils.sync_global_devices(f"{folder} is there")
    except BaseException:
        if first:
            with contextlib.suppress(UserError):  # the bucket does not answer: the first error says so
                remove_folder(new)
        raise


@contextlib.contextmanager
def locally(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A local folder whose files are in ``folder`` afterwards, for libraries that write local files only."""
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="pdrop-") as name:
        yield pathlib.Path(name)
        for path in pathlib.Path(name).iterdir():
            copy_file(path, folder / path.name)


def copy_files(source: pathlib.Path, target: pathlib.Path, patterns: Iterable[str]) -> None:
    """Copies the files of ``source`` that match, except those that ``target`` already has.

    Raises:
      UserError: one of them is not a regular file, or is a link to outside of ``source``.
    """
    for path in files_to_copy(source, patterns):
        if not (target / path.name).exists():
            copy_file(path, target / path.name)


def copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file of any size on the local disk, and one that fits in memory from or to a bucket."""
    if in_bucket(source) or in_bucket(target):
        target.write_bytes(read_bytes(source))
    else:
        shutil.copyfile(source, target)


def files_to_copy(source: pathlib.Path, patterns: Iterable[str]) -> list[pathlib.Path]:
    """The files of ``source`` that match. Raises UserError as ``copy_files`` does."""
    there = list(source.iterdir()) if source.is_dir() else []  # listed once: in a bucket that is a request
    found = [path for pattern in patterns for path in there if path.match(pattern) and not path.is_dir()]
    root = source.resolve()
    # In Hugging Face's cache the files of models--NAME/snapshots/REVISION are links into models--NAME/blobs.
    cache = next((parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"), root)
    for path in found:
        check_file(path)
        place = path.resolve()
        # An untrusted folder may link to a secret of this machine, which would be published with the copy.
        if not place.is_relative_to(root) and not place.is_relative_to(cache):
            raise UserError(f"{path} is a link to {place}, outside of its folder: replace it by a copy of that file")
    return found
