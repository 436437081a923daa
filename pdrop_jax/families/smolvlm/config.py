"""The released sizes of SmolVLM2; the config of its tower is ``internvl``'s."""

from typing import Any, Literal

from pdrop_jax.families.internvl.config import TiledVisionConfig
from pdrop_jax.text_config import TextConfig

Size = Literal["256m", "500m", "2.2b"]


def released_fields(size: Size) -> dict[str, Any]:
    """Of the ``LlavaConfig``."""
    return {"projector_layers": 1, "image_token_id": 49190, "bos_token_id": 1, "eos_token_ids": (49279,)}


def released_tower(size: Size) -> TiledVisionConfig:
    """SigLIP base on 512 pixels, or SigLIP SO400M on 384 for the largest model."""
    if size == "2.2b":
        return TiledVisionConfig(
            kind="smolvlm",
            image_size=384,
            hidden_size=1152,
            intermediate_size=4304,
            num_layers=27,
            activation="gelu_tanh",
            layer_scale=False,
            merge_size=3,
        )
    return TiledVisionConfig(
        kind="smolvlm",
        image_size=512,
        patch_size=16,
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_heads=12,
        activation="gelu_tanh",
        layer_scale=False,
        merge_size=4,
    )


def released_text(size: Size) -> TextConfig:
    """SmolLM2 with SmolVLM's tokens."""
    D, F, L, N, K = {
        "256m": (576, 1536, 30, 9, 3),
        "500m": (960, 2560, 32, 15, 5),
        "2.2b": (2048, 8192, 24, 32, 32),
    }[size]
    return TextConfig(
        vocab_size=49280,
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        head_dim=64,
        rope_theta=130000.0 if size == "2.2b" else 100000.0,
        norm_eps=1e-5,
        max_length=8192,
        family="smolvlm",
    )
