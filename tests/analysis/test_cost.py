"""MACs against a count by hand and the compiler's."""

import jax
import numpy as np
import pytest

from pdrop_jax.analysis.cost import decode_macs, prefill_macs, training_macs
from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.inputs.anyres import whole
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.model.params import init_params
from pdrop_jax.model.stacking import unstack
from pdrop_jax.model.vlm import prefill
from pdrop_jax.schedule import DropSchedule


def test_prefill_counted_by_hand():
    config = LlavaConfig(
        vision=VisionConfig(4, 2, 8, 16, 2, 2),  # 4 patches; one of its two layers runs
        text=TextConfig(
            vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2
        ),
        schedule=DropSchedule((1,), (0.5,)),
    )
    macs = prefill_macs(config, Bucket(2, (4,)))
    weights = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6  # q, k and v, o, mlp
    assert macs.decoder == (6 * weights + 2 * 36 * 4) + (4 * weights + 2 * 16 * 4)
    assert macs.ranking == 6 * 4 * 2 + 4 * 4 + 6 * 4
    assert macs.head == 40
    assert macs.vision == 4 * 12 * 8 + 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 25 * 8
    assert macs.projector == 4 * (8 * 4 + 4 * 4)
    assert macs.total == macs.vision + macs.projector + macs.decoder + macs.ranking + macs.head
    assert decode_macs(config, Bucket(2, (4,))) == 2 * weights + 2 * (7 + 5) * 4 + 40


def test_a_training_row_is_three_times_what_is_trained():
    config = LlavaConfig.llava_1_5_7b()
    bucket = Bucket(64, (576,))
    forward = prefill_macs(config, bucket)
    everything = training_macs(config, bucket, 1, ("vision", "projector", "llm"))
    assert everything == 3 * (forward.total - forward.ranking) + forward.ranking
    pretraining = training_macs(config, bucket, 20, ("projector",))
    language = 2 * (forward.decoder + 20 * forward.head)
    assert pretraining == forward.vision + 3 * forward.projector + language + forward.ranking


def test_the_compiler_counts_the_same():
    """With the layers in a list there is no loop that it would count once. It counts norms, softmax and rope too."""
    text = TextConfig(512, 512, 1024, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=128, max_length=512)
    vision = VisionConfig(112, 14, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=2)
    config, bucket = LlavaConfig(vision, text, DropSchedule((1,), (0.5,))), Bucket(64, (64,))
    row = Row([*range(3, 35), IMAGE_PLACEHOLDER, *range(35, 67)], [whole(np.zeros((112, 112, 3), np.float32), config)])
    program = jax.jit(prefill, static_argnums=(0, 3), static_argnames="implementation")
    arguments = config, unstack(init_params(config)), assemble([row], config, bucket), 8
    flops = program.lower(*arguments, implementation="xla").compile().cost_analysis()["flops"]
    assert prefill_macs(config, bucket).total == pytest.approx(flops / 2, rel=0.03)
