"""InternVL in transformers' own format: config.json and names of tensors, in both directions."""

import dataclasses
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.convert.hf_parts import ACTIVATIONS, read_text, text_to_hf
from pdrop_jax.convert.hf_schema import Section, Text, one_of
from pdrop_jax.convert.names import CONV, DECODER, LINEAR, MERGE, SAME, Naming, Table, Transform, dense, norm
from pdrop_jax.convert.waves import one_crop
from pdrop_jax.errors import UserError
from pdrop_jax.families.internvl.config import TiledVisionConfig
from pdrop_jax.inputs.anyres import ImageTokens
from pdrop_jax.schema import Heads, Layers, NormEps, Pixels, TokenId, Width, validated

KINDS = {"internvl": "InternVLForConditionalGeneration"}  # model_type -> class of transformers
Sides = Pixels | tuple[Pixels, Pixels]


class Vision(Section):
    """InternViT, with transformers' defaults."""

    model_type: str = "internvl_vision"
    hidden_size: Width = 1024
    intermediate_size: Width = 4096
    num_hidden_layers: Layers = 24
    num_attention_heads: Heads = 16
    attention_bias: bool = False
    use_qk_norm: bool = False
    hidden_act: str = "gelu"
    norm_type: str = "layer_norm"
    layer_norm_eps: NormEps = 1e-6
    image_size: Sides = 448
    patch_size: Sides = 14
    num_channels: int = 3
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = True
    use_mean_pooling: bool = True


class Model(Section):
    """config.json."""

    model_type: str
    text_config: dict[str, Any] = Field(default_factory=dict)
    vision_config: dict[str, Any] = Field(default_factory=dict)
    image_token_id: TokenId = 151667
    image_seq_length: Annotated[int, Field(ge=1, le=2**16)] = 256
    downsample_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int | list[int] = -1
    vision_feature_select_strategy: str = "default"
    tie_word_embeddings: bool | None = None


def parts_from_hf(data: dict[str, Any], where: str) -> tuple[TextConfig, Text, dict[str, Any]]:
    """Text config, checked text section, and the other fields of the ``LlavaConfig`` that ``data`` describes.

    Raises:
      UserError: a value has the wrong type or is out of range, or something is not supported.
    """
    found = validated(Model, data, where)
    one_of("model_type", found.model_type, tuple(KINDS))
    one_of("projector_hidden_act", found.projector_hidden_act, ("gelu",))
    one_of("vision_feature_select_strategy", found.vision_feature_select_strategy, ("default",))
    if found.vision_feature_layer != -1:
        raise UserError(
            f"{where}: vision_feature_layer {found.vision_feature_layer} is not supported for internvl, whose features "
            "are the last layer's, -1"
        )
    text, special = text_from_hf(found.text_config, found.tie_word_embeddings, ("qwen2", "qwen3"), where)
    merge = 1 / found.downsample_ratio
    if merge != int(merge):
        raise UserError(f"{where}: downsample_ratio is {found.downsample_ratio}, expected 1 divided by a whole number")
    vision = vision_from_hf(found.vision_config, int(merge), where)
    if found.image_seq_length != vision.crop_features:
        raise UserError(
            f"{where}: image_seq_length is {found.image_seq_length}, but a tile of this tower has "
            f"{vision.crop_features} tokens"
        )
    fields = {"vision": vision, "select_layer": -1, "image_token_id": found.image_token_id}
    return dataclasses.replace(text, family="internvl"), special, fields


def text_from_hf(
    data: dict[str, Any], tied: bool | None, kinds: tuple[str, ...], where: str
) -> tuple[TextConfig, Text]:
    """The language model, of one of ``kinds``. What the whole model says about tied embeddings goes first."""
    given = {"model_type": kinds[0], **data}
    one_of("language model_type", given["model_type"], kinds)
    if tied is not None:
        given["tie_word_embeddings"] = tied
    return read_text(given, where, "text_config.")


def vision_from_hf(data: dict[str, Any], merge: int, where: str) -> TiledVisionConfig:
    found = validated(Vision, data, where, "vision_config.")
    one_of("vision model_type", found.model_type, ("internvl_vision",))
    supported = {"num_channels": 3, "use_mask_token": False, "use_absolute_position_embeddings": True}
    for key, value in {**supported, "use_mean_pooling": True}.items():
        if getattr(found, key) != value:
            raise UserError(f"{where}: vision_config.{key} {getattr(found, key)} is not supported, expected {value}")
    return TiledVisionConfig(
        kind="internvl",
        image_size=side_of(found.image_size, "image_size", where),
        patch_size=side_of(found.patch_size, "patch_size", where),
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_layers=found.num_hidden_layers,
        num_heads=found.num_attention_heads,
        norm_eps=found.layer_norm_eps,
        activation=ACTIVATIONS[one_of("vision_config.hidden_act", found.hidden_act, tuple(ACTIVATIONS))],
        qkv_bias=found.attention_bias,
        rms_norm=one_of("vision_config.norm_type", found.norm_type, ("layer_norm", "rms_norm")) == "rms_norm",
        qk_norm=found.use_qk_norm,
        merge_size=merge,
    )


def side_of(size: int | tuple[int, int], key: str, where: str) -> int:
    """The side of a square that a config gives as one number or as two."""
    height, width = size if isinstance(size, tuple) else (size, size)
    if height != width:
        raise UserError(f"{where}: vision_config.{key} is {height}x{width}, but only squares are supported")
    return height


def config_to_hf(config: LlavaConfig, special: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for transformers; ``special`` are the ids of BOS and EOS."""
    vision = config.vision
    assert isinstance(vision, TiledVisionConfig)
    text = dataclasses.replace(config.text, family="qwen3" if config.text.qk_norm else "qwen2")
    return {
        "architectures": [KINDS["internvl"]],
        "model_type": "internvl",
        "torch_dtype": dtype,
        "image_token_id": config.image_token_id,
        "image_seq_length": vision.crop_features,
        "downsample_ratio": 1 / vision.merge_size,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.text.tie_embeddings,
        "text_config": text_to_hf(text) | special | {"torch_dtype": dtype},
        "vision_config": {
            "model_type": "internvl_vision",
            "torch_dtype": dtype,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_norm,
            "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == vision.activation),
            "norm_type": "rms_norm" if vision.rms_norm else "layer_norm",
            "layer_norm_eps": vision.norm_eps,
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
        },
    }


fixed_image = one_crop


def torch_inputs(config: LlavaConfig, image: ImageTokens, shown: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers' class takes beside the ids for ``fixed_image``; ``shown`` (1, n) is 1 at its tokens."""
    return {"pixel_values": image.crops.transpose(0, 3, 1, 2).copy()}


def _with_ones(axes: int) -> Transform:
    """An array that PyTorch stores with ``axes`` axes of size 1 in front."""
    return Transform(
        lambda shape: (1,) * axes + shape, lambda x, shape: x.reshape(shape), lambda x: x.reshape((1,) * axes + x.shape)
    )


@dataclasses.dataclass(frozen=True)
class InternNaming(Naming):
    """Names of a whole model."""

    def table(self, config: LlavaConfig) -> Table:
        block, embed = f"{self.vision}encoder.layer.{{n}}.", f"{self.vision}embeddings."
        rows = {
            **dense("vision.embed.patch", f"{embed}patch_embeddings.projection", CONV),
            "vision.embed.class_token": (f"{embed}cls_token", _with_ones(2)),
            "vision.embed.position": (f"{embed}position_embeddings", _with_ones(1)),
            **norm("vision.layers.attention_norm", f"{block}layernorm_before"),
            **dense("vision.layers.attention.o", f"{block}attention.projection_layer", MERGE),
            "vision.layers.attention_scale.scale": (f"{block}lambda_1", SAME),
            **norm("vision.layers.mlp_norm", f"{block}layernorm_after"),
            **dense("vision.layers.mlp.up", f"{block}mlp.fc1"),
            **dense("vision.layers.mlp.down", f"{block}mlp.fc2"),
            "vision.layers.mlp_scale.scale": (f"{block}lambda_2", SAME),
            **norm("projector.norm", f"{self.projector}layer_norm"),
            "head.kernel": (self.head, LINEAR),
        }
        for name in "qkv":
            rows |= dense(f"vision.layers.attention.{name}", f"{block}attention.{name}_proj")
            rows |= norm(f"vision.layers.attention.{name}_norm", f"{block}attention.{name}_norm")
        for n in range(2):
            rows |= dense(f"projector.linear_{n}", f"{self.projector}linear_{n + 1}")
        return rows | {ours: (self.decoder + theirs, transform) for ours, (theirs, transform) in DECODER.items()}


NAMINGS: dict[str, Naming] = {
    "hf": InternNaming(  # of the hub, and as transformers saves
        "vision_tower.", "language_model.model.", "language_model.lm_head.weight", "multi_modal_projector."
    ),
    "hf-modules": InternNaming(  # of the modules
        "model.vision_tower.", "model.language_model.", "lm_head.weight", "model.multi_modal_projector."
    ),
}
