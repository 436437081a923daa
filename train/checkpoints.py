"""Checkpoints of a training run: written asynchronously by orbax, and verified when they are read.

::

    RUN/checkpoints/500/    after 500 steps: trained parameters, optimizer state and CheckpointMetadata

No state of the data pipeline is stored: the step number determines which rows a step reads.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from pdrop_jax.checkpoint import check_shapes
from pdrop_jax.checkpoint.checksums import checksums
from pdrop_jax.checkpoint.failed_saves import end_failed_save
from pdrop_jax.checkpoint.noise import silence_library_noise
from pdrop_jax.checkpoint.remote import orbax_context, orbax_path
from pdrop_jax.errors import UserError, printable
from pdrop_jax.model.params import path_name
from pdrop_jax.paths import as_path, in_bucket, move_folder
from pdrop_jax.train.recipe import RunRecipe, differences
from pdrop_jax.train.step import not_finite

FOLDER = "checkpoints"

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """JSON metadata that identifies the run and step of a training state.

    Attributes:
      step: number of optimizer steps taken.
      recipe: recipe of the run, as ``dataclasses.asdict`` gives it.
      schedule: drop schedule that determines how the layers are stacked into stages.
      start: fingerprint of the checkpoint that training started from.
      data: fingerprint of the data set.
    """

    step: int
    recipe: dict[str, dict[str, Any]]
    schedule: dict[str, Any]
    start: str
    data: str


@dataclasses.dataclass(frozen=True)
class Trained(CheckpointMetadata):
    """Metadata of a trained model, written next to its arrays.

    Attributes:
      checkpoint: digest of the training checkpoint that the model comes from, which covers all of its arrays.
    """

    checkpoint: str


def changes(old: CheckpointMetadata, new: CheckpointMetadata) -> list[str]:
    """Differences in recipe, starting model and data that prevent a run from being resumed, as text."""
    found = differences(*(json.loads(json.dumps(metadata.recipe)) for metadata in (old, new)))
    if old.start != new.start:
        found.append("model.start contains a different model")
    if old.data != new.data:
        found.append("data.conversations contains different rows")
    return found


class Checkpoints:
    """Context manager for the checkpoints in ``folder``. All processes of a run must make the same calls."""

    def __init__(self, folder: str | os.PathLike, run: RunRecipe) -> None:
        self.folder = as_path(folder).absolute() / FOLDER
        self.run = run
        silence_library_noise()
        self._pending: tuple[int, Any] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if "_orbax" in vars(self):
            with contextlib.suppress(Exception):  # ``wait`` has already raised any error of the last save
                self._orbax.close()

    @functools.cached_property
    def _orbax(self) -> Any:
        """Created on first use, after damaged checkpoints have been moved out of the folder."""
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(self.run.keep_last)]
        if self.run.keep_every:
            kept.append(policies.EveryNSteps(self.run.keep_every))
        return ocp.training.Checkpointer(
            orbax_path(self.folder),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # left by a run that was killed while saving
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, newest first."""
        found = [path for path in self.folder.glob("*[0-9]") if path.name.isdigit()]
        if in_bucket(self.folder):  # where orbax writes in place, and this object last
            found = [path for path in found if (path / "commit_success.txt").exists()]
        return sorted((int(path.name) for path in found), reverse=True)

    def save(self, metadata: CheckpointMetadata, state: Any) -> None:
        """Starts an asynchronous save of ``state``, a tree of arrays, after waiting for the previous save.

        The arrays of ``state`` may be donated as soon as this returns.

        Raises:
          UserError: the previous save failed, ``state`` contains NaN or infinity, or the disk is too full.
        """
        self.wait()
        arrays = named(state)
        if bad := not_finite(arrays):
            raise UserError(
                f"after {metadata.step:,} steps, {len(bad)} of {len(arrays)} arrays of the training state contain NaN "
                f"or infinity, the first is {bad[0]}; {self.kept}: lower optimizer.learning_rate"
            )
        if not in_bucket(self.folder):
            needed, free = sum(x.nbytes for x in arrays.values()), shutil.disk_usage(self.folder.parent).free
            if free < needed:
                raise self._full(metadata.step, f"it needs {needed / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free")
        about = {
            "origin": dataclasses.asdict(metadata),
            "arrays": {name: [list(x.shape), x.dtype.name] for name, x in arrays.items()},
            "checksums": checksums(arrays),
        }
        saved = {"state": arrays, "about": {**about, "digest": _digest(about)}}
        with self._writing(metadata.step), orbax_context(self.folder):
            response = self._orbax.save_checkpointables_async(metadata.step, saved, force=True)
        self._pending = metadata.step, response

    def wait(self, block: bool = True) -> None:
        """Waits until the last save is on disk. With ``block=False``, only checks whether a finished save failed.

        Raises:
          UserError: the save failed. Earlier checkpoints are unaffected.
        """
        if self._pending and (block or not self._orbax.is_saving_in_progress()):
            (step, response), self._pending = self._pending, None
            with self._writing(step):
                response.result()

    def restore(self, abstract_of: Callable[[CheckpointMetadata], Any]) -> tuple[CheckpointMetadata, Any] | None:
        """Loads the newest intact checkpoint; returns None if there is none.

        Damaged checkpoints are reported on stderr and moved out of the folder.

        Args:
          abstract_of: returns the tree of ``jax.ShapeDtypeStruct``, with shardings, that a checkpoint with the given
            metadata should contain. Its exceptions are propagated.

        Raises:
          UserError: the arrays of the checkpoint belong to a different model.
        """
        for step in self.steps:
            about = self._about(step)
            found = None
            if about is not None:
                metadata = CheckpointMetadata(**about["origin"])
                abstract = abstract_of(metadata)
                check_arrays(abstract, about["arrays"], self.folder / str(step))
                found = self._load(step, abstract, about["checksums"])
            if all(multihost_utils.process_allgather(np.array(found is not None)).ravel()):
                return metadata, found
            self._set_aside(step)
        return None

    def digest(self, step: int) -> str | None:
        """Digest of a checkpoint's metadata and checksums; None if the checkpoint is damaged or missing."""
        about = self._about(step)
        return None if about is None else _digest(about)

    @property
    def kept(self) -> str:
        """The checkpoint that a failed run can be resumed from, for use in error messages."""
        return f"the checkpoint of step {self.steps[0]:,} is kept" if self.steps else "there is no earlier checkpoint"

    def _about(self, step: int) -> dict[str, Any] | None:
        """Metadata, array shapes and checksums of a checkpoint; None if they are damaged."""
        try:
            with orbax_context(self.folder):
                about = ocp.load_checkpointables(orbax_path(self.folder / str(step)), {"about": None})["about"]
            digest = about.pop("digest")
            return about if digest == _digest(about) and about["origin"]["step"] == step else None
        except Exception:  # orbax raises many types on damaged files
            return None

    def _load(self, step: int, abstract: Any, expected: dict[str, int]) -> Any:
        try:
            with orbax_context(self.folder):
                found = ocp.load_checkpointables(orbax_path(self.folder / str(step)), {"state": named(abstract)})
            arrays = found["state"]
        except Exception:  # as above
            return None
        found = checksums(arrays)
        if any(found[name] != value for name, value in expected.items()):
            return None

        def leaf(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
            return arrays[path_name(path)] if x.size else jnp.zeros(x.shape, x.dtype, device=x.sharding)

        return jax.tree.map_with_path(leaf, abstract)

    def _set_aside(self, step: int) -> None:
        damaged = self.folder.with_name(f"damaged-{step}")
        if jax.process_index() == 0:
            number = 0
            while damaged.exists():
                number += 1
                damaged = damaged.with_name(f"damaged-{step}-{number}")
            move_folder(self.folder / str(step), damaged)
            print(
                f"warning: the checkpoint of step {step} is damaged and was moved to {printable(damaged)}",
                file=sys.stderr,
            )
        multihost_utils.sync_global_devices("damaged checkpoint moved")

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorStore reports a full disk as ValueError, other code as OSError
            end_failed_save()
            raise self._full(step, str(error).splitlines()[0][-200:]) from None

    def _full(self, step: int, reason: str) -> UserError:
        remedy = "make sure that the bucket can be written" if in_bucket(self.folder) else "free disk space"
        return UserError(
            f"the checkpoint of step {step} cannot be written to {self.folder} ({reason}); {self.kept}: "
            f"{remedy} and run the same command again"
        )


def named(state: Any) -> Arrays:
    """Arrays of a tree by dotted name, without empty arrays, which orbax cannot store."""
    return {path_name(path): x for path, x in jax.tree.leaves_with_path(state) if x.size}


def check_arrays(abstract: Any, stored: dict[str, Any], where: pathlib.Path) -> None:
    """Raises UserError if the names or shapes of a checkpoint's arrays differ from those of ``abstract``."""
    expected = {name: tuple(x.shape) for name, x in named(abstract).items()}
    found = {name: tuple(shape) for name, (shape, _) in stored.items()}
    check_shapes(expected, found, f"{where} belongs to a different model or to different trained groups")


def _digest(about: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()
