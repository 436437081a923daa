"""Loading checkpoints for inference."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pdrop_jax.checkpoint import load as load_checkpoint
from pdrop_jax.config import CacheDtype, LlavaConfig, Quantization
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model.params import Params, count
from pdrop_jax.model.quantization import is_quantized
from pdrop_jax.model.scores import find_score
from pdrop_jax.model.stacking import restage, unstack
from pdrop_jax.model.tiles import tile
from pdrop_jax.paths import as_path
from pdrop_jax.schedule import DropSchedule

DEMO = pathlib.Path(__file__).parents[1] / "demo"  # a small trained model that comes with the package


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded checkpoint; ``mesh`` is None on one device."""

    config: LlavaConfig
    params: Params
    processor: Processor
    mesh: Mesh | None = None

    @property
    def dtype(self) -> np.dtype:
        """Of activations, and of KV caches unless ``config.text.cache_dtype`` is set."""
        return self.params["embed"]["embedding"].dtype

    def __repr__(self) -> str:
        sizes = f"{short_count(count(self.params))} parameters, {self.dtype}"
        layers = ", ".join(map(str, self.config.schedule.layers))
        where = "" if self.mesh is None else f", mesh {dict(self.mesh.shape)}"
        return f"Model({self.config.family}, {sizes}, {f'drops after layers {layers}' if layers else 'dense'}{where})"


def load(
    folder: str | os.PathLike = DEMO,
    schedule: DropSchedule | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    quantize: Quantization | None = None,
    verify: bool = True,
    quantize_cache: CacheDtype | None = None,
) -> Model:
    """Loads a converted or trained checkpoint from its folder; ``pdrop_jax.load`` takes other models too.

    Args:
      folder: checkpoint folder; the default is the demo model.
      schedule: drop schedule; None is the checkpoint's.
      dtype: dtype of parameters and activations, float32 or bfloat16; None is the checkpoint's.
      mesh: device mesh, see ``sharding.make_mesh``; None is one device.
      quantize: quantizes the decoder's linear layers: their weights ("int8", "int4"), or weights and activations
        ("w8a8", "w4a8", "w4a4"), see ``model.quantization``.
      verify: compare every array with its checksum.
      quantize_cache: "int8" or "int4" for the KV caches, see ``model.cache``; None is ``dtype``.

    Raises:
      UserError: the folder is not a checkpoint, it is damaged, the schedule does not fit the decoder, or ``quantize``
        or ``quantize_cache`` has another value.
    """
    if folder == DEMO and not DEMO.exists():
        raise UserError("this installation has no demo model: pass the folder of a checkpoint, --model DIR")
    folder = as_path(folder)
    config, params = load_checkpoint(
        folder,
        schedule=schedule,
        dtype=dtype,
        mesh=mesh,
        quantize=quantize,
        verify=verify,
        quantize_cache=quantize_cache,
    )
    processor = Processor.load(folder, config)
    return Model(config, arrange(config, params, mesh), processor, mesh)


def arrange(config: LlavaConfig, params: Params, mesh: Mesh | None = None) -> Params:
    """``params`` as inference on this platform reads them fastest: stacks in a TPU's tiles, elsewhere lists of layers.

    XLA for CPUs and GPUs copies the weights of each layer out of a scanned stack, so a decode step would move them
    three times. Stacks stay on a mesh, and int8 ones on a CPU, where XLA would convert all layers of a list at once.

    Consumes ``params``: its arrays are replaced one after the other, so that the model is never in memory twice.
    """
    platform = jax.default_backend()
    if platform == "tpu":
        return tile(config, params, mesh)
    quantized = any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))
    return params if mesh is not None or (quantized and platform == "cpu") else unstack(params)


def reschedule(model: Model, schedule: DropSchedule) -> Model:
    """``model`` with another schedule. Arrays are shared unless a stage boundary moves.

    Raises:
      UserError: the schedule does not fit the decoder, or its score does not fit the model.
    """
    config = dataclasses.replace(model.config, schedule=schedule)
    find_score(config)
    params = restage(model.params, model.config, schedule)
    if jax.default_backend() == "tpu":
        params = tile(config, params, model.mesh)
    processor = dataclasses.replace(model.processor, config=config)
    return dataclasses.replace(model, config=config, params=params, processor=processor)


def short_count(n: int) -> str:
    """ "2.4M" for 2,400,000."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.1f}{letter}"
    return str(n)
