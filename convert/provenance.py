"""Where a converted model comes from: a file beside it, from which the model card of an export is written."""

import dataclasses
import importlib.metadata
import json
import pathlib
from typing import Annotated

from pydantic import Field

from pdrop_jax import checkpoint
from pdrop_jax.convert.hub import Location
from pdrop_jax.errors import printable
from pdrop_jax.io import read_json
from pdrop_jax.schema import NO_OTHER_KEYS, validated

Text = Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{4,64}$")]


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The contents of source.json.

    Attributes:
      checkpoint: id on the Hub, or name of a folder.
      commit: hash of the commit on the Hub; None if it was a folder.
      vision_tower, vision_commit: likewise for a vision tower from elsewhere.
      pdrop_jax: version that converted it.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    checkpoint: Text
    commit: Commit | None
    vision_tower: Text | None
    vision_commit: Commit | None
    pdrop_jax: Text


def write_provenance(folder: pathlib.Path, source: Location, tower: Location | None) -> None:
    """Writes source.json of a model that was converted from ``source``, with ``tower`` if it was separate."""
    found = Provenance(
        checkpoint=_public_name(source),
        commit=source.commit,
        vision_tower=_public_name(tower) if tower else None,
        vision_commit=tower.commit if tower else None,
        pdrop_jax=importlib.metadata.version("pdrop-jax"),
    )
    (folder / checkpoint.SOURCE).write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")


def read_provenance(folder: pathlib.Path) -> Provenance | None:
    """None if the model was converted before provenance was recorded. UserError if the file is damaged."""
    path = folder / checkpoint.SOURCE
    return validated(Provenance, read_json(path), str(path)) if path.exists() else None


def _public_name(location: Location) -> str:
    """Without the folders of the machine that converted it, which a published model should not show."""
    return location.repo or printable(location.folder.resolve().name)[:256]
