"""MACs against the paper's printed values and against a count by hand."""

import jax
import numpy as np
import pytest

from pdrop_jax.analysis.cost import average_tokens, decode_macs, paper_macs, prefill_macs, training_macs
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.inputs.anyres import whole
from pdrop_jax.inputs.conversation import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.processor import Row, assemble
from pdrop_jax.model.llava import prefill
from pdrop_jax.model.params import init_params, unstack
from pdrop_jax.schedule import Bucket, DropSchedule

SEVEN = LlavaConfig.llava_1_5_7b().text
THIRTEEN = LlavaConfig.llava_1_5_13b().text


def pyramid(ratio: float) -> DropSchedule:
    return DropSchedule((8, 16, 24), (ratio, ratio**2, ratio**3))


@pytest.mark.parametrize(
    ("config", "schedule", "tokens", "tera"),
    [
        (SEVEN, DropSchedule.none(), 576, 3.8172),
        (SEVEN, pyramid(0.4), 576, 1.5403),
        (SEVEN, pyramid(0.5), 576, 1.7774),
        (SEVEN, pyramid(0.6), 576, 2.0626),
        (SEVEN, DropSchedule.none(), 2880, 20.825),
        (SEVEN, pyramid(0.4), 2880, 8.219),
        (SEVEN, pyramid(0.5), 2880, 9.4646),
        (SEVEN, pyramid(0.6), 2880, 10.981),
        (SEVEN, DropSchedule.none(), 5184, 40.616),
        (SEVEN, pyramid(0.5), 5184, 18.076),
        (SEVEN, DropSchedule((2,), (0.5,)), 576, 2.0075),  # FastV
        (SEVEN, DropSchedule((2,), (0.5,)), 2880, 10.554),
        (SEVEN, DropSchedule.none(), 2048, 14.362),
        (SEVEN, pyramid(0.5), 2048, 6.582),
        (SEVEN, DropSchedule((2,), (0.5,)), 2048, 7.372),
        (SEVEN, DropSchedule((10, 20), (0.5, 0.25)), 576, 2.1342),
        (THIRTEEN, DropSchedule.none(), 576, 7.444),
    ],
)
def test_the_papers_values(config, schedule, tokens, tera):
    digits = len(str(tera).partition(".")[2])
    assert abs(paper_macs(config, schedule, tokens) / 1e12 - tera) <= 0.51 * 10**-digits


@pytest.mark.parametrize(("schedule", "average"), [(pyramid(0.5), 270), (DropSchedule((2,), (0.5,)), 306)])
def test_average_tokens(schedule, average):
    assert average_tokens(SEVEN, schedule, 576) == average


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
    assert macs.total == macs.vision + macs.projector + macs.language
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
    """With the layers in a list there is no loop that it would count once; it counts norms and softmax besides."""
    text = TextConfig(512, 512, 1024, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=128, max_length=512)
    vision = VisionConfig(112, 14, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=2)
    config, bucket = LlavaConfig(vision, text, DropSchedule((1,), (0.5,))), Bucket(64, (64,))
    row = Row([*range(3, 35), IMAGE_PLACEHOLDER, *range(35, 67)], [whole(np.zeros((112, 112, 3), np.float32), config)])
    program = jax.jit(prefill, static_argnums=(0, 3), static_argnames="implementation")
    arguments = config, unstack(init_params(config)), assemble([row], config, bucket), 8
    flops = program.lower(*arguments, implementation="xla").compile().cost_analysis()["flops"]
    assert prefill_macs(config, bucket).total == pytest.approx(flops / 2, rel=0.03)
