"""PyramidDrop for LLaVA in JAX: drop the image tokens that the question attends to least, stage by stage.

Example::

    import pdrop_jax

    model = pdrop_jax.load("llava-hf/llava-1.5-7b-hf")
    pdrop_jax.generate(model, ["What is on the table?"], ["kitchen.jpg"]).texts

    sampling = pdrop_jax.Sampling(max_new_tokens=128, temperature=0.7)
    pdrop_jax.generate(model, ["Describe it."], ["kitchen.jpg"], sampling).texts
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdrop_jax.analysis.budget import schedule_for_budget as schedule_for_budget
    from pdrop_jax.batch import Batch as Batch
    from pdrop_jax.batch import Bucket as Bucket
    from pdrop_jax.compilation_cache import enable_compilation_cache as enable_compilation_cache
    from pdrop_jax.config import LlavaConfig as LlavaConfig
    from pdrop_jax.config import TextConfig as TextConfig
    from pdrop_jax.config import VisionConfig as VisionConfig
    from pdrop_jax.convert.pretrained import load as load
    from pdrop_jax.errors import UserError as UserError
    from pdrop_jax.generation.chat import Session as Session
    from pdrop_jax.generation.continuous import Engine as Engine
    from pdrop_jax.generation.continuous import EngineFull as EngineFull
    from pdrop_jax.generation.engine import generate as generate
    from pdrop_jax.generation.pretrained import DEMO as DEMO
    from pdrop_jax.generation.pretrained import Model as Model
    from pdrop_jax.generation.result import Answer as Answer
    from pdrop_jax.generation.result import Generation as Generation
    from pdrop_jax.generation.sampling import Sampling as Sampling
    from pdrop_jax.inputs.frames import Standby as Standby
    from pdrop_jax.inputs.images import Video as Video
    from pdrop_jax.inputs.processor import Processor as Processor
    from pdrop_jax.model.scores import TokenScore as TokenScore
    from pdrop_jax.model.scores import register_score as register_score
    from pdrop_jax.schedule import DropSchedule as DropSchedule

_MODULES = {
    "Answer": "generation.result",
    "Batch": "batch",
    "Bucket": "batch",
    "DEMO": "generation.pretrained",
    "DropSchedule": "schedule",
    "Engine": "generation.continuous",
    "EngineFull": "generation.continuous",
    "Generation": "generation.result",
    "LlavaConfig": "config",
    "Model": "generation.pretrained",
    "Processor": "inputs.processor",
    "Sampling": "generation.sampling",
    "Session": "generation.chat",
    "Standby": "inputs.frames",
    "TextConfig": "config",
    "TokenScore": "model.scores",
    "UserError": "errors",
    "Video": "inputs.images",
    "VisionConfig": "config",
    "enable_compilation_cache": "compilation_cache",
    "generate": "generation.engine",
    "load": "convert.pretrained",
    "register_score": "model.scores",
    "schedule_for_budget": "analysis.budget",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line answers --help without waiting for jax and transformers.
    if name == "__version__":
        return importlib.metadata.version("pdrop-jax")
    if name not in _MODULES:
        raise AttributeError(f"module 'pdrop_jax' has no attribute {name!r}")
    module = importlib.import_module(f"pdrop_jax.{_MODULES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
