"""The entry point "lmms_eval.models", by which lmms-eval finds this package without loading the model's code."""

from typing import Any


def manifest() -> Any:
    """The registration of the model ``pdrop_jax``, see ``eval.lmms``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="pdrop_jax", simple_class_path="pdrop_jax.eval.lmms.PdropJax")
