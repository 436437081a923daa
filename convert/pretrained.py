"""Loading what a user names: a folder, or a model on the Hugging Face Hub."""

import os
from typing import Any, Literal

from jax.sharding import Mesh

from pdrop_jax.config import MODELS, LlavaConfig
from pdrop_jax.config import config_of as own_config
from pdrop_jax.convert.cache import is_pytorch, model_folder
from pdrop_jax.convert.hub import hub_id, locate
from pdrop_jax.convert.sources import source_config
from pdrop_jax.generation import pretrained
from pdrop_jax.generation.pretrained import DEMO, Model
from pdrop_jax.schedule import DropSchedule


def load(
    model: str | os.PathLike = DEMO,
    schedule: DropSchedule | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    quantize: Literal["int8"] | None = None,
    verify: bool = True,
) -> Model:
    """Loads a model from a folder or from the Hugging Face Hub.

    A PyTorch checkpoint is converted when it is first loaded, and kept in ``~/.cache/pdrop`` or ``$PDROP_CACHE``.

    Args:
      model: folder of a converted or trained model or of a PyTorch checkpoint; or "owner/name" or
        "owner/name@revision" on the Hub, if there is no such folder. The default is the demo model.
      schedule: drop schedule; None is the checkpoint's.
      dtype: dtype of parameters and activations, float32 or bfloat16; None is the checkpoint's.
      mesh: device mesh, see ``sharding.make_mesh``; None is one device.
      quantize: "int8" quantizes the weights of the decoder's linear layers, see ``model.quantization``; activations
        stay ``dtype``.
      verify: compare every array with its checksum.

    Raises:
      UserError: there is no such model or it cannot be downloaded, it is not supported, it is damaged, the schedule
        does not fit the decoder, or ``quantize`` has another value.
    """
    return pretrained.load(model_folder(model, dtype), schedule, dtype, mesh, quantize, verify)


def config_of(model: str) -> LlavaConfig:
    """The config of a model named in ``config.MODELS``, or of what ``load`` takes. No weights are downloaded.

    Raises:
      UserError: there is no such model, or it is not supported.
    """
    if model in MODELS or not (hub_id(model) or is_pytorch(model)):
        return own_config(model)
    location = locate(model)
    return own_config(str(location.folder)) if location.converted else source_config(location)
