"""The released sizes of Qwen3-VL; the config of its tower is ``qwen2_vl``'s."""

from typing import Literal

from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.text_config import TextConfig


def released(size: Literal["2b", "4b", "8b", "32b"]) -> tuple[TextConfig, QwenVisionConfig]:
    """Decoder and tower of the dense models."""
    D, F, L, N = {
        "2b": (2048, 6144, 28, 16),
        "4b": (2560, 9728, 36, 32),
        "8b": (4096, 12288, 36, 32),
        "32b": (5120, 25600, 64, 64),
    }[size]
    text = TextConfig(
        vocab_size=151936,
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=8,
        rope_theta=5e6,
        norm_eps=1e-6,
        tie_embeddings=size in ("2b", "4b"),
        qk_norm=True,
        max_length=262144,
        family="qwen3_vl",
        mrope_sections=(24, 20, 20),
        mrope_interleaved=True,
    )
    small = size in ("2b", "4b")
    vision = QwenVisionConfig(
        kind="qwen3_vl",
        patch_size=16,
        hidden_size=1024 if small else 1152,
        intermediate_size=4096 if small else 4304,
        num_layers=24 if small else 27,
        activation="gelu_tanh",
        window_size=None,
        full_layers=(),
        tokens_per_second=None,
        position_side=48,
        deepstack_layers=(5, 11, 17) if small else (8, 16, 24),
    )
    return text, vision
