"""Ways to show a picture by 16 tokens, as models that begin as the demo model: what each trains, and its input."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pdrop_jax import checkpoint
from pdrop_jax.config import Group, LlavaConfig, StandbyConfig
from pdrop_jax.generation.pretrained import DEMO
from pdrop_jax.inputs.frames import Standby
from pdrop_jax.inputs.images import Video
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model.params import Params, add_standby
from pdrop_jax.schedule import DropSchedule

TOKENS = 16
SIDE = 4  # the square root of TOKENS


@dataclasses.dataclass(frozen=True)
class Way:
    """A model, and how it is shown pictures.

    Attributes:
      groups: what is trained; everything else stays that of the demo model.
      show: frames -> what the processor is given for them, one picture for each token sequence.
    """

    config: LlavaConfig
    params: Params
    processor: Processor
    groups: tuple[Group, ...]
    show: Callable[[list[np.ndarray]], list[Any]]


def demo() -> tuple[LlavaConfig, Params]:
    """The demo model without drops, which would fall differently on each way."""
    return checkpoint.load(DEMO, schedule=DropSchedule.none())


def standby() -> Way:
    config, params = demo()
    config = dataclasses.replace(config, standby=StandbyConfig(TOKENS))
    params = add_standby(config, params)
    return Way(config, params, Processor.load(DEMO, config), ("standby",), lambda frames: [Standby(Video(frames))])


def average_pool() -> Way:
    """Means over squares of 3 x 3 patches, taken before the projector."""
    config, params = demo()
    config = dataclasses.replace(config, frame_stride=config.vision.image_size // config.vision.patch_size // SIDE)
    return Way(config, params, Processor.load(DEMO, config), ("projector",), lambda frames: [Video(frames)])


def low_resolution() -> Way:
    """Pictures of 4 x 4 patches; the table of positions is averaged over squares."""
    config, params = demo()
    patch = config.vision.patch_size
    vision = dataclasses.replace(config.crop_tower, image_size=SIDE * patch)
    table = np.asarray(params["vision"]["embed"]["position"])
    side = config.vision.image_size // patch
    squares = table[1:].reshape(SIDE, side // SIDE, SIDE, side // SIDE, -1).mean((1, 3)).reshape(TOKENS, -1)
    params["vision"]["embed"]["position"] = jnp.asarray(np.concatenate([table[:1], squares]))
    processor = Processor.load(DEMO, config)
    config = dataclasses.replace(config, vision=vision)
    size = {"height": vision.image_size, "width": vision.image_size}
    settings = processor.image_processor.to_dict() | {"size": {"shortest_edge": vision.image_size}, "crop_size": size}
    small: Any = CLIPImageProcessorPil.from_dict(settings)
    processor = dataclasses.replace(processor, config=config, image_processor=small)
    return Way(config, params, processor, ("projector",), list)


WAYS: dict[str, Callable[[], Way]] = {
    "standby tokens": standby,
    "average pool": average_pool,
    "low resolution": low_resolution,
}


def thawed(way: Way, *groups: Group) -> Way:
    """``way`` that also trains ``groups``."""
    return dataclasses.replace(way, groups=(*way.groups, *groups))


def copied(params: Params) -> Params:
    """A copy, since training donates its arrays."""
    return jax.tree.map(jnp.array, params)
