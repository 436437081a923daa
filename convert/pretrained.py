"""Loading what a user names: a folder, or a model on the Hugging Face Hub."""

import os
from typing import Any

from jax.sharding import Mesh

from pdrop_jax.config import MODELS, CacheDtype, LlavaConfig, Quantization
from pdrop_jax.config import config_of as own_config
from pdrop_jax.convert.cache import is_pytorch, model_folder
from pdrop_jax.convert.hub import hub_id, locate
from pdrop_jax.convert.sources import source_config
from pdrop_jax.generation import pretrained
from pdrop_jax.generation.pretrained import DEMO, Model
from pdrop_jax.model.quantization import check_quantization
from pdrop_jax.schedule import DropSchedule


def load(
    model: str | os.PathLike = DEMO,
    schedule: DropSchedule | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    quantize: Quantization | None = None,
    verify: bool = True,
    quantize_cache: CacheDtype | None = None,
) -> Model:
    """Loads a model from a folder or from the Hugging Face Hub.

    A PyTorch checkpoint is converted when it is first loaded, and kept in ``~/.cache/pdrop`` or ``$PDROP_CACHE``.

    Args:
      model: folder of a converted or trained model or of a PyTorch checkpoint; or "owner/name" or
        "owner/name@revision" on the Hub, if there is no such folder. The default is the demo model.
      schedule: drop schedule; None is the checkpoint's.
      dtype: dtype of parameters and activations, float32 or bfloat16; None is the checkpoint's.
      mesh: device mesh, see ``sharding.make_mesh``; None is one device.
      quantize: quantizes the decoder's linear layers: their weights ("int8", "int4"), or weights and activations
        ("w8a8", "w4a8", "w4a4"), see ``model.quantization``.
      verify: compare every array with its checksum.
      quantize_cache: "int8" or "int4" for the KV caches, see ``model.cache``; None is ``dtype``.

    Raises:
      UserError: there is no such model or it cannot be downloaded, it is not supported, it is damaged, the schedule
        does not fit the decoder, or ``quantize`` or ``quantize_cache`` has another value.
    """
    check_quantization(quantize, quantize_cache)  # before anything is downloaded
    return pretrained.load(model_folder(model, dtype), schedule, dtype, mesh, quantize, verify, quantize_cache)


def config_of(model: str) -> LlavaConfig:
    """The config of a model named in ``config.MODELS``, or of what ``load`` takes. No weights are downloaded.

    Raises:
      UserError: there is no such model, or it is not supported.
    """
    if model in MODELS or not (hub_id(model) or is_pytorch(model)):
        return own_config(model)
    location = locate(model)
    return own_config(str(location.folder)) if location.converted else source_config(location)
