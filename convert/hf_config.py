"""The config of a whole model: from Hugging Face's config.json, or the original LLaVA code's, to ours, and back."""

import dataclasses
import difflib
from types import ModuleType
from typing import Any

from pdrop_jax.config import LlavaConfig, TextConfig, Tiling, VisionConfig
from pdrop_jax.convert.hf_parts import (
    ORIGINAL_TYPES,
    max_tiles_from_hf,
    read_text,
    special_tokens,
    text_to_hf,
    tiling_from_hf,
    vision_from_hf,
    vision_to_hf,
)
from pdrop_jax.convert.hf_schema import GenerationSettings, Llava, Preprocessor, one_of
from pdrop_jax.convert.names import NAMINGS, Naming
from pdrop_jax.convert.original_config import original_from_hf, original_type
from pdrop_jax.errors import UserError
from pdrop_jax.families.gemma3 import checkpoint as gemma3
from pdrop_jax.families.internvl import checkpoint as internvl
from pdrop_jax.families.qwen2_vl import checkpoint as qwen2_vl
from pdrop_jax.families.qwen3_vl import checkpoint as qwen3_vl
from pdrop_jax.families.smolvlm import checkpoint as smolvlm
from pdrop_jax.inputs.model_template import OWN
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.schema import validated

# model_type of Hugging Face's code -> ids of "<image>" and "<video>" that transformers uses if a config has none.
HF_TYPES: dict[str, tuple[int, int | None]] = {
    "llava": (32000, None),
    "llava_next": (32000, None),
    "llava_next_video": (32001, 32000),
    "llava_onevision": (151646, 151647),
}
# model_type of a family beside LLaVA -> its translation.
FAMILIES: dict[str, ModuleType] = {
    kind: family for family in (qwen2_vl, qwen3_vl, gemma3, internvl, smolvlm) for kind in family.KINDS
}
LLAMA_3_VOCABULARY = 128256  # LLaMA 1 and 2 have 32000 tokens, plus those that were added


def llava_from_hf(
    data: dict[str, Any],
    *,
    vision: VisionConfig | None = None,
    generation: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    schedule: DropSchedule | None = None,
    where: str = "config.json",
) -> LlavaConfig:
    """The model that the config.json of a PyTorch checkpoint describes.

    Args:
      data: ``llava_llama``, ``llava_mistral``, ``llava_qwen`` (the original LLaVA code's, also of LLaVA-NeXT),
        ``llava_qwen3`` (of its forks), ``llava``, ``llava_next``, ``llava_next_video`` or ``llava_onevision`` (Hugging
        Face's), or one of ``FAMILIES``.
      vision: the tower of an original model, whose own config only has its name; optional for LLaVA-1.5's tower.
      generation: generation_config.json, whose end tokens take precedence.
      preprocessor: preprocessor_config.json, the only place where a Hugging Face model says whether images are padded.
      schedule: None is the paper's for LLaVA, ``DropSchedule.quarters`` for other families, and dense if the decoder is
        too shallow for it.
      where: how error messages refer to the file of ``data``.

    Raises:
      UserError: a value has the wrong type or is out of range, or something is not supported.
    """
    original = original_type(data)
    kind = original or _supported(data.get("model_type"), (*ORIGINAL_TYPES.values(), *HF_TYPES, *FAMILIES))
    if kind in FAMILIES:
        text, special, fields = FAMILIES[kind].parts_from_hf(data, where)
    elif original:
        text, special, fields = original_from_hf(data | {"model_type": original}, vision, where)
    else:
        text, special, fields = _hugging_face(data, preprocessor or {}, where)
    end = validated(GenerationSettings, generation or {}, "generation_config.json").eos_token_id
    if end is None:
        end = special.eos_token_id
    ends = () if end is None else tuple(end) if isinstance(end, list) else (end,)
    beyond = [token for token in (special.bos_token_id, *ends) if token is not None and token >= text.vocab_size]
    if beyond:
        raise UserError(f"{where}: token id {beyond[0]} is outside the vocabulary of {text.vocab_size} tokens")
    if schedule is None:
        schedule = _default_schedule(text, kind)
    return LlavaConfig(
        text=text,
        schedule=schedule,
        template=_template(text),
        bos_token_id=special.bos_token_id,
        eos_token_ids=ends,
        **fields,
    )


def _default_schedule(text: TextConfig, kind: str) -> DropSchedule:
    if kind in FAMILIES and text.num_layers >= 16:
        return DropSchedule.quarters(text.num_layers, text.full_layers)
    # The official code drops after these layers of a LLaVA of any depth.
    deep = kind not in FAMILIES and text.num_layers > DropSchedule().layers[-1]
    return DropSchedule() if deep else DropSchedule.none()


def _supported(kind: Any, known: tuple[str, ...]) -> str:
    """``kind``. Raises a UserError that names the nearest of ``known`` if it is not one of them."""
    near = difflib.get_close_matches(str(kind), known, 1)
    try:
        return one_of("model_type", kind, known)
    except UserError as error:
        raise UserError(f"{error}; the nearest supported family is {near[0]}" if near else str(error)) from None


def _hugging_face(
    data: dict[str, Any], preprocessor: dict[str, Any], where: str
) -> tuple[TextConfig, Any, dict[str, Any]]:
    """As ``_original``; missing keys have the defaults of transformers' LlavaConfig."""
    found = validated(Llava, data, where)
    one_of("projector_hidden_act", found.projector_hidden_act, ("gelu",))
    if not found.multimodal_projector_bias:
        raise UserError("multimodal_projector_bias false is not supported: LLaVA's projector has a bias")
    if not isinstance(found.vision_feature_layer, int):
        raise UserError(f"vision_feature_layer {found.vision_feature_layer} is not supported: only a single layer is")
    text = dict(found.text_config or {})
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or found.tie_word_embeddings)
    vision = vision_from_hf(found.vision_config, where, "vision_config.") if found.vision_config else VisionConfig()
    image_id, video_id = HF_TYPES[found.model_type]
    video = found.model_type == "llava_next_video"
    if video:
        one_of("spatial_pool_mode", found.spatial_pool_mode, ("average",))
    strategy = one_of("vision_feature_select_strategy", found.vision_feature_select_strategy, ("default", "full"))
    if strategy == "default" and not vision.class_tokens:
        raise UserError(
            "vision_feature_select_strategy 'default' removes the class token of an image, but a "
            f"{vision.kind} tower has none: use 'full'"
        )
    pads = validated(Preprocessor, preprocessor, "preprocessor_config.json").do_pad
    return (
        *read_text(text, where, "text_config."),
        {
            "vision": vision,
            "tiling": _hf_tiling(found),
            "select_layer": found.vision_feature_layer,
            "keep_class_token": strategy == "full" and vision.class_tokens > 0,
            "image_aspect": "pad" if pads else "square",
            "frame_stride": found.spatial_pool_stride if video else None,
            "image_token_id": _first(found.image_token_index, found.image_token_id, image_id),
            "video_token_id": video_id and _first(found.video_token_index, found.video_token_id, video_id),
        },
    )


def _hf_tiling(found: Llava) -> Tiling | None:
    """Raises UserError if the vision_aspect_ratio of a OneVision model is not anyres_max_N."""
    if found.model_type == "llava":
        return None
    tiling = tiling_from_hf(found.image_grid_pinpoints, [0, 1], rounded=True)
    if found.model_type != "llava_onevision":
        return tiling
    most = max_tiles_from_hf("vision_aspect_ratio", found.vision_aspect_ratio)
    return dataclasses.replace(tiling, max_tiles=most, alone=True)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _template(text: TextConfig) -> str:
    """The chat template that LLaVA was trained with on such a language model; checkpoints do not say."""
    if text.family in FAMILIES:
        return OWN
    if text.family == "llama":
        return "llama_3" if text.vocab_size >= LLAMA_3_VOCABULARY else "vicuna_v1"
    return "mistral_instruct" if text.family == "mistral" else "qwen"


def hf_config(config: LlavaConfig, dtype: str) -> dict[str, Any]:
    """config.json for transformers, for the class that ``hf_class`` names.

    Raises:
      UserError: the class cannot express something that the model has.
    """
    if config.text.family in FAMILIES:
        found: dict[str, Any] = FAMILIES[config.text.family].config_to_hf(config, special_tokens(config), dtype)
        return found
    if config.projector_layers != 2:
        raise UserError(
            f"transformers' LLaVA has a projector of 2 layers, but this model's has {config.projector_layers}: "
            "use --format original"
        )
    kind, architecture = hf_class(config)
    tiling = config.tiling
    own: dict[str, Any] = {"image_grid_pinpoints": [list(point) for point in tiling.pinpoints]} if tiling else {}
    if tiling and tiling.max_tiles:
        own["vision_aspect_ratio"] = f"anyres_max_{tiling.max_tiles}"
    if config.frame_stride:
        own |= {"spatial_pool_mode": "average", "spatial_pool_stride": config.frame_stride}
    if config.video_token_id is not None:
        own["video_token_index"] = config.video_token_id
    return {
        "architectures": [architecture],
        "model_type": kind,
        "torch_dtype": dtype,
        **own,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": select_strategy(config),
        "tie_word_embeddings": config.text.tie_embeddings,
        "text_config": text_to_hf(config.text) | special_tokens(config) | {"torch_dtype": dtype},
        "vision_config": vision_to_hf(config.crop_tower) | {"torch_dtype": dtype},
    }


def hf_class(config: LlavaConfig) -> tuple[str, str]:
    """The model_type and the class of transformers for ``config``."""
    if config.text.family in FAMILIES:
        return config.text.family, FAMILIES[config.text.family].KINDS[config.text.family]
    if config.frame_stride:
        return "llava_next_video", "LlavaNextVideoForConditionalGeneration"
    if config.tiling is None:
        return "llava", "LlavaForConditionalGeneration"
    if config.tiling.max_tiles is None:
        return "llava_next", "LlavaNextForConditionalGeneration"
    return "llava_onevision", "LlavaOnevisionForConditionalGeneration"


def namings_for(config: LlavaConfig) -> dict[str, Naming]:
    """The names that a checkpoint of the model may have; "hf" and "original" are those that an export writes."""
    return FAMILIES[config.text.family].NAMINGS if config.text.family in FAMILIES else NAMINGS


def select_strategy(config: LlavaConfig) -> str:
    return "full" if config.keep_class_token or not config.vision.class_tokens else "default"


def with_image_token(config: LlavaConfig) -> LlavaConfig:
    """``config`` with an id for "<image>", which transformers needs and the original LLaVA's vocabulary lacks.

    The vocabulary grows to the next multiple of 64, like that of the checkpoints on the hub.
    """
    if config.image_token_id is not None:
        return config
    V = config.text.vocab_size
    text = dataclasses.replace(config.text, vocab_size=(V // 64 + 1) * 64)
    return dataclasses.replace(config, text=text, image_token_id=V)
