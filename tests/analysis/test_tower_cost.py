"""MACs of a compressed tower: LLaVA-UHD v4's published figures, the compiler's count, and the command's table."""

import dataclasses
import functools
import json

import jax
import pytest

from pdrop_jax.analysis.cost import training_macs
from pdrop_jax.analysis.tower_cost import tower_macs
from pdrop_jax.batch import Bucket
from pdrop_jax.config import MODELS, EarlyCompression, LlavaConfig, VisionConfig
from pdrop_jax.model.compression import with_compression
from pdrop_jax.model.params import init_params
from pdrop_jax.model.stacking import unstack
from pdrop_jax.model.vision import vision_features

SO400M = VisionConfig(980, 14, 1152, 4304, 27, 16, activation="gelu_tanh", kind="siglip")  # 70 x 70 patches
PLAIN = LlavaConfig(SO400M, select_layer=-1)
ONE = Bucket(0, (1,), 1)
# (kind, k): GFLOPs in tables 4 and 5 of the paper, arXiv 2605.08985v1.
PUBLISHED = {
    (None, None): 3555.1,
    ("average", 6): 1368.7,
    ("unshuffle", 6): 1401.2,
    ("window", 6): 1573.1,
    ("window", 3): 1245.1,
    ("window", 9): 1901.1,
    ("window", 15): 2557.0,
}


def compressed(kind, k, plain=PLAIN):
    return with_compression(plain, EarlyCompression(k, kind), 1) if kind else plain


def published(config):
    """GFLOPs as the paper counts: MACs, 5 for a number of a norm, 4 for a score, window attention as if masked."""
    vision, compression = config.vision, config.vision.early_compression
    D, F, N = vision.hidden_size, vision.intermediate_size, vision.num_patches

    def beside(n):
        """Of a layer on n patches: its scores, two norms, two sums and its activation."""
        return 4 * vision.num_heads * n * n + n * (2 * 5 * D + 2 * D + F)

    first = compression.after + 1 if compression else vision.num_layers
    total = tower_macs(config, ONE).vision + first * beside(N) + (vision.num_layers - first) * beside(N // 4)
    if compression and compression.kind == "window":
        masked = 2 * N * N * D + 4 * vision.num_heads * N * N
        total += masked - 2 * 4 * N * D + N * (2 * 5 * D + D + F)
    return total / 1e9


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_the_published_figures_follow_from_the_shape_of_a_tower_with_70_x_70_patches(case):
    assert published(compressed(*case)) == pytest.approx(PUBLISHED[case], abs=0.1)


def test_the_published_ratios():
    base = published(PLAIN)
    ratios = [round(published(compressed("window", k)) / base, 4) for k in (3, 6, 9, 15)]
    assert ratios == [0.3502, 0.4425, 0.5347, 0.7192]
    # What runs here, without what the mask of the window attention would hide.
    ours = [tower_macs(compressed("window", k), ONE).vision for k in (3, 6, 9, 15)]
    assert [round(x / tower_macs(PLAIN, ONE).vision, 3) for x in ours] == [0.336, 0.428, 0.52, 0.704]


@pytest.mark.parametrize("kind", ["window", "unshuffle", "average"])
def test_the_compiler_counts_the_same(kind):
    plain = LlavaConfig(VisionConfig(112, 14, hidden_size=256, intermediate_size=512, num_layers=3, num_heads=2))
    config = compressed(kind, 0, dataclasses.replace(plain, select_layer=-1))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, hidden_size=8, intermediate_size=8))
    params = jax.eval_shape(lambda: unstack(init_params(config))["vision"])
    run = jax.jit(functools.partial(vision_features, config, implementation="xla"))
    pixels = jax.ShapeDtypeStruct((1, 112, 112, 3), "float32")
    flops = run.lower(params, pixels).compile().cost_analysis()["flops"]
    assert tower_macs(config, ONE).vision == pytest.approx(flops / 2, rel=0.04)


def test_training_counts_what_the_gradient_passes():
    config = with_compression(LlavaConfig.llava_1_5_7b(), EarlyCompression())
    bucket, tower = Bucket(64, (36,), 1), tower_macs(config, Bucket(64, (36,), 1))
    dense = training_macs(config, bucket, 1, ())
    assert training_macs(config, bucket, 1, ("compressor",)) - dense == (
        2 * tower.compressor + tower.later + tower.projector
    )
    assert training_macs(config, bucket, 1, ("vision", "compressor")) - dense == 2 * tower.vision + tower.projector


def test_the_command_shows_the_share_of_the_tower(pdrop, fails):
    plain = pdrop("cost")
    assert "| - vision tower | 0.183 T | 0.183 T |" in plain.stdout
    assert "| - vision tower, share | 4.1% | 7.6% |" in plain.stdout
    result = json.loads(pdrop("cost", "--compress-vision", 6, "--json").stdout)
    dense, dropped = (cost["prefill"] for cost in result["costs"])
    assert (
        dense["vision"]
        == dropped["vision"]
        == tower_macs(with_compression(LlavaConfig.llava_1_5_7b(), EarlyCompression(6)), Bucket(64, (36,), 1)).vision
    )
    line = fails("cost", "--compress-vision", 22)
    assert "the vision tower runs layers 0 to 22, choose one of 0 to 21" in line
    assert "has a merger of its own" in fails("cost", "--model", "qwen3-vl-2b", "--merge-size", 2)
    assert "must be at least 0, got -1" in fails("cost", "--compress-vision", -1)
    assert "towers, but this model's is internvl" in fails("cost", "--model", "internvl3-1b", "--compress-vision", 6)
    for name in ("qwen2.5-vl-7b", "qwen3-vl-8b"):
        config = with_compression(MODELS[name](), EarlyCompression())
        bucket = Bucket(0, (64,), 16)
        assert tower_macs(config, bucket).vision < 4 * tower_macs(MODELS[name](), bucket).vision
