"""The checkpoints of a run: orbax writes them while training goes on; what is read is checked.

::

    RUN/checkpoints/500/    after 500 steps: trained parameters, optimizer state, and their CheckpointMetadata

Nothing else has to be kept of the data: which rows a step takes follows from its number.
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
from pdrop_jax.checkpoint.storage import silence_library_noise
from pdrop_jax.errors import UserError, printable
from pdrop_jax.model.params import path_name
from pdrop_jax.train.recipe import RunRecipe, differences
from pdrop_jax.train.step import not_finite

FOLDER = "checkpoints"

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """What a state belongs to, all of it JSON.

    Attributes:
      step: optimizer steps taken.
      recipe: of the run.
      schedule: that the stages are stacked by.
      start: fingerprint of the checkpoint that the run began with.
      data: fingerprint of the data set.
    """

    step: int
    recipe: dict[str, dict[str, Any]]
    schedule: dict[str, Any]
    start: str
    data: str


@dataclasses.dataclass(frozen=True)
class Trained(CheckpointMetadata):
    """What a trained model is made of, written beside its arrays.

    Attributes:
      checkpoint: digest of the training checkpoint, and so of every array in it.
    """

    checkpoint: str


def changes(old: CheckpointMetadata, new: CheckpointMetadata) -> list[str]:
    """What ``new`` differs in from ``old`` in spite of the same folder, as text."""
    found = differences(*(json.loads(json.dumps(origin.recipe)) for origin in (old, new)))
    if old.start != new.start:
        found.append("model.start holds another model")
    if old.data != new.data:
        found.append("data.conversations holds other rows")
    return found


class Checkpoints:
    """The checkpoints below ``folder``; to be closed. All processes of a run make the same calls."""

    def __init__(self, folder: str | os.PathLike, run: RunRecipe) -> None:
        self.folder = pathlib.Path(folder).absolute() / FOLDER
        self.run = run
        silence_library_noise()
        self._pending: tuple[int, Any] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if "_orbax" in vars(self):
            with contextlib.suppress(Exception):  # ``wait`` has raised what there was to raise
                self._orbax.close()

    @functools.cached_property
    def _orbax(self) -> Any:
        """Made when it is first needed, with nothing damaged in the folder any more."""
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(self.run.keep_last)]
        if self.run.keep_every:
            kept.append(policies.EveryNSteps(self.run.keep_every))
        return ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # left by a run that was killed while saving
        )

    @property
    def steps(self) -> list[int]:
        """Those that are there, newest first."""
        return sorted((int(path.name) for path in self.folder.glob("*[0-9]") if path.name.isdigit()), reverse=True)

    def save(self, origin: CheckpointMetadata, state: Any) -> None:
        """Begins to write ``state``, a tree of arrays, which may be donated afterwards. Waits for the save before it.

        Raises:
          UserError: that one could not be written, or ``state`` is not finite.
        """
        self.wait()
        arrays = named(state)
        if bad := not_finite(arrays):
            raise UserError(
                f"after {origin.step:,} steps {len(bad)} of {len(arrays)} arrays of the run hold NaN or infinity, "
                f"{bad[0]} is the first; {self.kept}: lower optimizer.learning_rate"
            )
        needed, free = sum(x.nbytes for x in arrays.values()), shutil.disk_usage(self.folder.parent).free
        if free < needed:
            raise self._full(origin.step, f"it takes {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free")
        about = {
            "origin": dataclasses.asdict(origin),
            "arrays": {name: [list(x.shape), x.dtype.name] for name, x in arrays.items()},
            "checksums": checksums(arrays),
        }
        saved = {"state": arrays, "about": {**about, "digest": _digest(about)}}
        with self._writing(origin.step):
            response = self._orbax.save_checkpointables_async(origin.step, saved, force=True)
        self._pending = origin.step, response

    def wait(self, block: bool = True) -> None:
        """Until the last save is on the disk; without ``block`` only looks whether it failed.

        Raises:
          UserError: it could not be written. The checkpoints before it are untouched.
        """
        if self._pending and (block or not self._orbax.is_saving_in_progress()):
            (step, response), self._pending = self._pending, None
            with self._writing(step):
                response.result()

    def restore(self, abstract_of: Callable[[CheckpointMetadata], Any]) -> tuple[CheckpointMetadata, Any] | None:
        """The newest checkpoint that is whole; damaged ones are named on stderr and moved out of the way.

        Args:
          abstract_of: the tree that a checkpoint of this origin should hold, ``jax.ShapeDtypeStruct``s with shardings.
            What it raises is passed on.

        Raises:
          UserError: the checkpoint is of another model.
        """
        for step in self.steps:
            about = self._about(step)
            found = None
            if about is not None:
                origin = CheckpointMetadata(**about["origin"])
                abstract = abstract_of(origin)
                check_arrays(abstract, about["arrays"], self.folder / str(step))
                found = self._load(step, abstract, about["checksums"])
            if all(multihost_utils.process_allgather(np.array(found is not None)).ravel()):
                return origin, found
            self._set_aside(step)
        return None

    def digest(self, step: int) -> str | None:
        """Of a checkpoint with all its checksums; None if it is damaged or not there."""
        about = self._about(step)
        return None if about is None else _digest(about)

    @property
    def kept(self) -> str:
        """What there is to go on from, as part of a message."""
        return f"the checkpoint of step {self.steps[0]:,} stays" if self.steps else "there is no checkpoint before it"

    def _about(self, step: int) -> dict[str, Any] | None:
        """What was written beside the arrays, None if it is damaged."""
        try:
            about = ocp.load_checkpointables(self.folder / str(step), {"about": None})["about"]
            digest = about.pop("digest")
            return about if digest == _digest(about) and about["origin"]["step"] == step else None
        except Exception:  # whatever a damaged file makes orbax raise
            return None

    def _load(self, step: int, abstract: Any, expected: dict[str, int]) -> Any:
        try:
            arrays = ocp.load_checkpointables(self.folder / str(step), {"state": named(abstract)})["state"]
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
            (self.folder / str(step)).rename(damaged)
            print(f"warning: the checkpoint of step {step} is damaged, moved to {printable(damaged)}", file=sys.stderr)
        multihost_utils.sync_global_devices("damaged checkpoint moved")

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore reports a full disk as ValueError, others as OSError
            raise self._full(step, str(error).splitlines()[0][-200:]) from None

    def _full(self, step: int, reason: str) -> UserError:
        return UserError(
            f"the checkpoint of step {step} cannot be written to {self.folder}, {self.kept}: make room and run again "
            f"({reason})"
        )


def named(state: Any) -> Arrays:
    """The arrays of a tree by their dotted names, those without elements left out: orbax has no place for them."""
    return {path_name(path): x for path, x in jax.tree.leaves_with_path(state) if x.size}


def check_arrays(abstract: Any, stored: dict[str, Any], where: pathlib.Path) -> None:
    """Raises UserError if a checkpoint's arrays are not those of ``abstract``."""
    expected = {name: tuple(x.shape) for name, x in named(abstract).items()}
    found = {name: tuple(shape) for name, (shape, _) in stored.items()}
    check_shapes(expected, found, f"{where} is a checkpoint of another model or of other trained groups")


def _digest(about: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()
