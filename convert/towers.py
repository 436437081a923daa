"""The separate vision tower of an original checkpoint: in its folder, beside it, or on the Hugging Face Hub."""

import os
import pathlib
from typing import Any

from pdrop_jax import checkpoint
from pdrop_jax.config import VisionConfig, read_config
from pdrop_jax.convert.hf_parts import vision_from_hf
from pdrop_jax.convert.hub import Location, fetch_files, hub_id, locate, named_as_typed
from pdrop_jax.convert.original_config import TOWERS
from pdrop_jax.errors import UserError
from pdrop_jax.paths import is_file

OWNERS = {"clip-vit-large-patch14-336": "openai", "siglip-so400m-patch14-384": "google"}  # of ``TOWERS`` on the Hub


def open_tower(name: str | os.PathLike) -> Location:
    """A tower that the user or a config names, without its weights. UserError as ``locate``."""
    tower = locate(name)
    fetch_files(tower, checkpoint.PROCESSOR)
    return tower


def tower_config(tower: Location) -> VisionConfig:
    """The config in its folder. UserError if there is none, or it is not supported."""
    with named_as_typed(tower):
        return vision_from_hf(read_config(tower.folder), str(tower.folder / "config.json"))


def find_tower(folder: pathlib.Path, name: Any) -> Location | None:
    """The tower that the config of checkpoint ``folder`` names, if it lies in or beside it."""
    places = [folder / name, folder.absolute().parent / name] if name and isinstance(name, str) else []
    found = next((place for place in places if is_file(place / "config.json")), None)
    return Location(str(found), found) if found else None


def on_hub(name: Any) -> str | None:
    """The id of the tower that a config names: towers of ``TOWERS`` may be in a folder of the checkpoint's author.

    Raises:
      UserError: the name is the address of a web page.
    """
    if not isinstance(name, str):
        return None
    last = name.rpartition("/")[2]
    return f"{OWNERS[last]}/{last}" if last in OWNERS else name if hub_id(name) else None


def named_tower(folder: pathlib.Path, name: Any) -> Location:
    """The tower on the Hub that the config of checkpoint ``folder`` names. UserError if it is not there."""
    reason = f"{name} was not found"
    try:
        if found := on_hub(name):
            return open_tower(found)
    except UserError as error:
        reason = str(error)
    raise UserError(f"{folder} needs a separate vision tower, and {reason}; or pass its folder, --vision DIR")


def has_known_config(name: Any) -> bool:
    """Whether the config of a tower of this name is known without its files."""
    return str(name).rpartition("/")[2] in TOWERS
