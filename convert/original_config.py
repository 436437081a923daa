"""config.json of the original LLaVA code, LLaVA-NeXT's and LLaVA-OneVision's too, to our config and back."""

import contextlib
import dataclasses
import json
import re
from typing import Any

from pdrop_jax.config import MAX_PROJECTOR_LAYERS, LlavaConfig, TextConfig, Tiling, VisionConfig
from pdrop_jax.convert.hf_parts import (
    ORIGINAL_TYPES,
    max_tiles_from_hf,
    read_text,
    special_tokens,
    text_to_hf,
    tiling_from_hf,
)
from pdrop_jax.convert.hf_schema import OriginalLlava, Text, one_of
from pdrop_jax.convert.projector import projector_type
from pdrop_jax.errors import UserError
from pdrop_jax.schema import validated

KNOWN_TOWER = "openai/clip-vit-large-patch14-336"
# Vision towers by the last part of their names: a checkpoint that contains one need not come with its config.
TOWERS = {
    "clip-vit-large-patch14-336": VisionConfig(),
    "siglip-so400m-patch14-384": VisionConfig(
        image_size=384,
        patch_size=14,
        hidden_size=1152,
        intermediate_size=4304,
        num_layers=27,
        num_heads=16,
        norm_eps=1e-6,
        activation="gelu_tanh",
        kind="siglip",
        pooling_head=True,
    ),
}
CLASSES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
    "qwen3": "LlavaQwen3ForCausalLM",
}


def original_type(data: dict[str, Any]) -> str | None:
    """The model_type that the original code gives such a config; None if the config is not of that code.

    Some of its checkpoints say "llava", which is the type of transformers' own class today.
    """
    kind = data.get("model_type")
    if kind == "llava" and "mm_vision_tower" in data:
        types = {CLASSES[family]: name for family, name in ORIGINAL_TYPES.items()}
        classes = data.get("architectures")
        return types.get(str(classes[0]) if isinstance(classes, list) and classes else "", "llava_llama")
    return kind if kind in ORIGINAL_TYPES.values() else None


def original_from_hf(
    data: dict[str, Any], vision: VisionConfig | None, where: str
) -> tuple[TextConfig, Text, dict[str, Any]]:
    """Text config, checked text section and other fields; missing keys have the original code's defaults."""
    found = validated(OriginalLlava, data, where)
    if found.mm_use_im_start_end:
        raise UserError("mm_use_im_start_end is not supported: LLaVA-1.5 puts no markers around an image")
    aspect: Any = found.image_aspect_ratio or "square"
    tiled = aspect == "anyres" or aspect.startswith("anyres_max_")
    if not tiled:
        one_of("image_aspect_ratio", aspect, ("square", "pad", "anyres", "anyres_max_9"))
    merge = "spatial_unpad" if tiled else "flat"
    one_of(f"with image_aspect_ratio {aspect}, mm_patch_merge_type", found.mm_patch_merge_type, (merge,))
    feature = one_of("mm_vision_select_feature", found.mm_vision_select_feature, ("patch", "cls_patch"))
    vision = vision or TOWERS.get(str(found.mm_vision_tower).rpartition("/")[2])
    if vision is None:
        raise UserError(
            f"the config of vision tower {str(found.mm_vision_tower)[:100]!r} was not found: pass its folder, "
            "--vision DIR"
        )
    if found.mm_hidden_size != vision.hidden_size:
        raise UserError(
            f"mm_hidden_size is {found.mm_hidden_size} but the vision tower has hidden_size {vision.hidden_size}"
        )
    text, special = read_text(data, where)
    fields = {
        "vision": vision,
        "projector_layers": _projector_layers(found.mm_projector_type),
        "select_layer": found.mm_vision_select_layer,
        # The original code's SigLIP tower ignores it.
        "keep_class_token": feature == "cls_patch" and vision.class_tokens > 0,
        "image_aspect": "pad" if tiled else aspect,
        "tiling": _tiling(found.image_grid_pinpoints, aspect, vision.image_size) if tiled else None,
    }
    return text, special, fields


def _tiling(points: Any, aspect: str, tile: int) -> Tiling:
    """Of resolutions in pixels, width first, or of "(1x1),...,(6x6)": all grids of tiles between the two."""
    if isinstance(points, str) and (ends := re.fullmatch(r"\((\d)x(\d)\),.*\((\d)x(\d)\)", points)):
        w0, h0, w1, h1 = map(int, ends.groups())
        points = [[w * tile, h * tile] for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
    elif isinstance(points, str):
        with contextlib.suppress(ValueError):  # a list that was written as text
            points = json.loads(points)
    tiling = tiling_from_hf(points, [1, 0], rounded=False)
    if aspect == "anyres":
        return tiling
    return dataclasses.replace(tiling, max_tiles=max_tiles_from_hf("image_aspect_ratio", aspect), alone=True)


def _projector_layers(kind: str) -> int:
    found = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if kind != "linear" and not (found and int(found[1]) <= MAX_PROJECTOR_LAYERS):
        raise UserError(
            f"mm_projector_type {kind!r} is not supported, expected linear or mlp2x_gelu "
            f"(up to {MAX_PROJECTOR_LAYERS} layers)"
        )
    return int(found[1]) if found else 1


def without_last_layer(vision: VisionConfig) -> VisionConfig:
    """A SigLIP tower as the original code runs and saves it: it deletes the last layer and the pooling head."""
    return dataclasses.replace(vision, num_layers=vision.num_layers - 1, pooling_head=False)


def original_config(config: LlavaConfig, dtype: str) -> dict[str, Any]:
    """config.json of the original LLaVA code.

    Raises:
      UserError: it is a OneVision model, whose tower that code builds by its name, a LLaVA-NeXT-Video model, whose
        names in that code are not known here, has a Qwen3 decoder, or is of another family.
    """
    tiling = config.tiling
    if config.text.family == "qwen3":
        raise UserError("the original code has no Qwen3: export the model in Hugging Face's format, --format hf")
    if config.family != "LLaVA" or config.frame_stride or (tiling and tiling.max_tiles):
        kind = "LLaVA-NeXT-Video" if config.frame_stride else "LLaVA-OneVision" if tiling else config.family
        raise UserError(f"a {kind} model can be exported in Hugging Face's format only: --format hf")
    points = [[width, height] for height, width in tiling.pinpoints] if tiling else None
    return {
        **text_to_hf(config.text),
        **special_tokens(config),
        "architectures": [CLASSES[config.text.family]],
        "model_type": ORIGINAL_TYPES[config.text.family],
        "torch_dtype": dtype,
        "image_aspect_ratio": "anyres" if tiling else config.image_aspect,
        **({"image_grid_pinpoints": points} if tiling else {}),
        "mm_hidden_size": config.vision.hidden_size,
        "mm_patch_merge_type": "spatial_unpad" if tiling else "flat",
        "mm_projector_type": projector_type(config.projector_layers),
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch" if config.keep_class_token else "patch",
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_tower": KNOWN_TOWER if config.vision == VisionConfig() else tower_folder(config),
        "unfreeze_mm_vision_tower": True,  # otherwise that code loads the tower by its name
        "use_mm_proj": True,
    }


def tower_folder(config: LlavaConfig) -> str:
    return f"{config.vision.kind}_tower"
