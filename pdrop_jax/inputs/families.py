"""The families beside LLaVA, on the host. On the device they are in tables of ``model.params`` and ``model.vision``."""

from pdrop_jax.families.gemma3 import inputs as gemma3
from pdrop_jax.families.internvl import inputs as internvl
from pdrop_jax.families.qwen2_vl import inputs as qwen2_vl
from pdrop_jax.families.qwen3_vl import inputs as qwen3_vl
from pdrop_jax.families.smolvlm import inputs as smolvlm
from pdrop_jax.inputs.family import HostFamily

FAMILIES: dict[str, HostFamily] = {  # by LlavaConfig.family
    "gemma3": gemma3.FAMILY,
    "internvl": internvl.FAMILY,
    "smolvlm": smolvlm.WITH_VIDEOS,
    "idefics3": smolvlm.FAMILY,
    "qwen2_vl": qwen2_vl.FAMILY,
    "qwen2_5_vl": qwen2_vl.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
}
