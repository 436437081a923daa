"""A small random model that speaks the demo model's words, for tests of servers."""

import jax
import jax.numpy as jnp
import numpy as np

from pdrop_jax import DEMO, checkpoint
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.model.params import abstract_params
from pdrop_jax.schedule import DropSchedule

CONFIG = LlavaConfig(
    VisionConfig(168, 14, hidden_size=128, intermediate_size=24, num_layers=1, num_heads=2),  # 144 image tokens
    TextConfig(312, 32, 48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_length=512),
    DropSchedule((1, 2), (0.5, 0.2)),
    select_layer=-1,
    image_aspect="pad",
    template="bare",
    eos_token_ids=(2,),
)


def write_model(folder, config=CONFIG):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), abstract_params(config))
    checkpoint.save(folder, config, params, companions=DEMO, single_file=True)
    return folder
