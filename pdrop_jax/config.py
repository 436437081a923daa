"""What a model is: a frozen dataclass, read from either kind of config.json, saved as JSON with the schedule."""

import dataclasses
import json
import pathlib
import re
from typing import Any, Literal

from pdrop_jax.errors import UserError
from pdrop_jax.io import read_json
from pdrop_jax.parts import FAMILIES, ORIGINAL_TYPES, RopeScaling, TextConfig, VisionConfig, one_of
from pdrop_jax.schedule import DropSchedule

FORMAT = "pdrop-jax-1"
KNOWN_TOWER = "openai/clip-vit-large-patch14-336"  # what VisionConfig() describes
# model_type of Hugging Face's code -> ids of "<image>" and "<video>" that transformers takes if a config has none.
HF_TYPES: dict[str, tuple[int, int | None]] = {
    "llava": (32000, None),
    "llava_next": (32000, None),
    "llava_next_video": (32001, 32000),
    "llava_onevision": (151646, 151647),
}
LLAMA_3_VOCABULARY = 128256  # LLaMA 1 and 2 have 32000, and what was added


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Pictures of any size as tiles, LLaVA-NeXT's anyres; see ``inputs.anyres``.

    Attributes:
      pinpoints: (height, width) pixels of the resolutions that a picture is resized into.
      max_tiles: of more features than those of so many tiles, fewer are made (OneVision's anyres_max_9); None is all.
      rounded: how many features a picture covers is rounded before it is truncated, as Hugging Face's code does.
      alone: a picture is tiled only if its row has no other (OneVision).
    """

    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int | None = None
    rounded: bool = False
    alone: bool = False

    @classmethod
    def next(cls, tile: int = 336) -> "Tiling":
        """LLaVA-NeXT's five resolutions, of tiles of ``tile`` pixels."""
        return cls(tuple((h * tile, w * tile) for h, w in ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))))


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA model with its drop schedule. The defaults are LLaVA-1.5-7B with the paper's schedule."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    schedule: DropSchedule = DropSchedule()
    projector_layers: int = 2  # 1 is ``linear``, n is ``mlp{n}x_gelu``
    select_layer: int = -2  # hidden state of the vision tower that is projected; -1 is its last layer's output
    keep_class_token: bool = False  # CLIP's: False is the feature selection "patch" (Hugging Face: "default")
    image_aspect: Literal["square", "pad"] = "square"
    tiling: Tiling | None = None  # None: a picture is one crop, made as image_aspect says
    # A video's frames are averaged over squares of so many features a side before the projector, as in Hugging Face's
    # LLaVA-NeXT-Video; None: their features are resized to half a side behind it.
    frame_stride: int | None = None
    template: str = "vicuna_v1"
    image_token_id: int | None = None  # id of "<image>" in a Hugging Face tokenizer; the original has none
    video_token_id: int | None = None  # id of "<video>", likewise
    bos_token_id: int | None = 1  # None: a text begins with nothing, as Qwen2's
    eos_token_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        if not 1 <= self.vision_layers <= self.vision.num_layers:
            raise UserError(
                f"select_layer {self.select_layer} names no hidden state of a vision tower of "
                f"{self.vision.num_layers} layers"
            )
        tile = self.vision.image_size
        if self.tiling and (
            not self.tiling.pinpoints or any(n < tile or n % tile for point in self.tiling.pinpoints for n in point)
        ):
            raise UserError(
                f"pictures cannot be tiled into {list(self.tiling.pinpoints)}: each side must be a multiple of the "
                f"{tile} pixels of the vision tower"
            )
        if self.tiling and self.keep_class_token:
            raise UserError("tiles with class tokens are not supported: the feature selection must be patch")
        if self.keep_class_token and not self.vision.class_tokens:
            raise UserError(f"a {self.vision.kind} tower has no class token to keep")
        if self.frame_stride is not None and not 1 <= self.frame_stride <= self.vision.patches_a_side:
            raise UserError(
                f"frames of {self.vision.patches_a_side} features a side cannot be averaged over {self.frame_stride}"
            )
        self.schedule.check(self.text.num_layers)

    @property
    def vision_layers(self) -> int:
        """Layers of the vision tower that have to run."""
        if self.select_layer < 0:
            return self.vision.num_layers + 1 + self.select_layer
        return self.select_layer

    @property
    def image_tokens(self) -> int:
        """Features of one crop: its tokens, unless pictures are tiled."""
        return self.vision.num_patches + self.keep_class_token

    @property
    def frame_tokens(self) -> int:
        """Features that a crop also has as a frame of a video, where those are averaged before the projector."""
        return (self.vision.patches_a_side // self.frame_stride) ** 2 if self.frame_stride else 0

    @property
    def taps(self) -> int:
        """Features that a token may be blended of."""
        return 4 if self.tiling and self.tiling.max_tiles else 1

    @classmethod
    def llava_1_5_7b(cls) -> "LlavaConfig":
        return cls(image_aspect="pad")

    @classmethod
    def llava_1_5_13b(cls) -> "LlavaConfig":
        text = TextConfig(
            hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128
        )
        return cls(text=text, image_aspect="pad")

    @classmethod
    def llava_next_7b(cls) -> "LlavaConfig":
        """LLaVA-NeXT with Vicuna: LLaVA-1.5's parts, pictures in up to four tiles and once as a whole."""
        return dataclasses.replace(cls.llava_1_5_7b(), tiling=Tiling.next())

    @classmethod
    def llava_next_13b(cls) -> "LlavaConfig":
        return dataclasses.replace(cls.llava_1_5_13b(), tiling=Tiling.next())

    @classmethod
    def from_hf(
        cls,
        data: dict[str, Any],
        *,
        vision: VisionConfig | None = None,
        generation: dict[str, Any] | None = None,
        preprocessor: dict[str, Any] | None = None,
        schedule: DropSchedule | None = None,
    ) -> "LlavaConfig":
        """From the config.json of a PyTorch checkpoint.

        Args:
          data: ``llava_llama``, ``llava_mistral``, ``llava_qwen`` (the original LLaVA code's, also of LLaVA-NeXT),
            ``llava``, ``llava_next``, ``llava_next_video`` or ``llava_onevision`` (Hugging Face's).
          vision: the tower of an original model, whose own config only names it; may be left out for LLaVA-1.5's.
          generation: generation_config.json, whose end tokens win.
          preprocessor: preprocessor_config.json; a Hugging Face model says only there whether pictures are padded.
          schedule: without one the paper's if the decoder has layers enough, otherwise nothing is dropped.

        Raises:
          UserError: something that is not supported.
        """
        originals = tuple(ORIGINAL_TYPES.values())
        original = one_of("model_type", data.get("model_type"), (*originals, *HF_TYPES)) in originals
        fields = _original(data, vision) if original else _llava(data, preprocessor or {})
        text_data = data if original else data.get("text_config") or {}
        text = fields["text"]
        defaults = FAMILIES[text.family]
        bos = _first(text_data.get("bos_token_id"), defaults.get("bos_token_id"))
        eos = _first(
            (generation or {}).get("eos_token_id"), text_data.get("eos_token_id"), defaults.get("eos_token_id")
        )
        if schedule is None:
            schedule = DropSchedule() if text.num_layers > DropSchedule().layers[-1] else DropSchedule.none()
        return cls(
            **fields,
            schedule=schedule,
            template=_template(text),
            bos_token_id=bos,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["schedule"] = self.schedule.to_json()
        return {"format": FORMAT, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LlavaConfig":
        if data.get("format") != FORMAT:
            raise UserError(
                f"config.json has format {data.get('format')!r}, expected {FORMAT!r}: a PyTorch checkpoint must be "
                "converted first, pdrop convert SRC OUT"
            )
        data = {key: value for key, value in data.items() if key != "format"}
        text, tiling = dict(data["text"]), data.get("tiling")
        if text["rope_scaling"]:
            text["rope_scaling"] = RopeScaling(**text["rope_scaling"])
        if tiling:
            tiling = Tiling(**tiling | {"pinpoints": tuple(map(tuple, tiling["pinpoints"]))})
        return cls(
            **{
                **data,
                "vision": VisionConfig(**data["vision"]),
                "text": TextConfig(**text),
                "tiling": tiling,
                "schedule": DropSchedule.from_json(data["schedule"]),
                "eos_token_ids": tuple(data["eos_token_ids"]),
            }
        )

    def save(self, folder: pathlib.Path) -> None:
        (folder / "config.json").write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: pathlib.Path) -> "LlavaConfig":
        """Raises UserError if ``folder`` holds no config.json of ours."""
        folder = pathlib.Path(folder)
        try:
            return cls.from_json(read_config(folder))
        except (KeyError, TypeError) as error:  # a key that is missing, or one that no field has
            raise UserError(f"{folder}/config.json is damaged, copy or convert it again: {error}") from None


MODELS = {
    "llava-1.5-7b": LlavaConfig.llava_1_5_7b,
    "llava-1.5-13b": LlavaConfig.llava_1_5_13b,
    "llava-next-7b": LlavaConfig.llava_next_7b,
    "llava-next-13b": LlavaConfig.llava_next_13b,
}


def config_of(model: str) -> LlavaConfig:
    """The config of one of ``MODELS``, or of a checkpoint's folder; UserError if it is neither."""
    return MODELS[model]() if model in MODELS else LlavaConfig.load(pathlib.Path(model))


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The JSON object in the config.json of a checkpoint, ours or another's; UserError if there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is no checkpoint: it has no config.json")
    return read_json(path)


def _original(data: dict[str, Any], vision: VisionConfig | None) -> dict[str, Any]:
    """Fields of an original LLaVA model; keys that are left out have that code's defaults."""
    for key in ("mm_vision_select_layer", "mm_hidden_size"):
        if key not in data:
            raise UserError(f"config.json has no {key}: it is no complete config of an original LLaVA")
    if data.get("mm_use_im_start_end"):
        raise UserError("mm_use_im_start_end is not supported: a picture stands between no marks in LLaVA-1.5")
    aspect = one_of("image_aspect_ratio", data.get("image_aspect_ratio") or "square", ("square", "pad", "anyres"))
    merge = "spatial_unpad" if aspect == "anyres" else "flat"
    one_of(f"with image_aspect_ratio {aspect}, mm_patch_merge_type", data.get("mm_patch_merge_type", "flat"), (merge,))
    feature = data.get("mm_vision_select_feature", "patch")
    kind = data.get("mm_projector_type", "linear")
    layers = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if kind != "linear" and not layers:
        raise UserError(f"mm_projector_type {kind!r} is not supported: linear or mlp2x_gelu (any number of layers) is")
    tower = str(data.get("mm_vision_tower"))
    if vision is None and not tower.endswith(KNOWN_TOWER.rpartition("/")[2]):
        raise UserError(f"the config of vision tower {tower!r} is not at hand: pass its folder, --vision DIR")
    vision = vision or VisionConfig()
    if data["mm_hidden_size"] != vision.hidden_size:
        raise UserError(
            f"mm_hidden_size is {data['mm_hidden_size']} but the vision tower has hidden_size {vision.hidden_size}"
        )
    return {
        "vision": vision,
        "text": TextConfig.from_hf(data),
        "projector_layers": int(layers[1]) if layers else 1,
        "select_layer": data["mm_vision_select_layer"],
        # The original code's SigLIP tower does not look at it.
        "keep_class_token": one_of("mm_vision_select_feature", feature, ("patch", "cls_patch")) == "cls_patch"
        and vision.class_tokens > 0,
        "image_aspect": "pad" if aspect == "anyres" else aspect,
        "tiling": _tiling(data, [1, 0], rounded=False) if aspect == "anyres" else None,
    }


def _tiling(data: dict[str, Any], order: list[int], *, rounded: bool) -> Tiling:
    """Args: ``order``, where height and width stand in a resolution."""
    points = data.get("image_grid_pinpoints")
    try:
        return Tiling(tuple((int(point[order[0]]), int(point[order[1]])) for point in points or ()), rounded=rounded)
    except (TypeError, ValueError, IndexError):
        raise UserError(f"image_grid_pinpoints {points!r} is not a list of resolutions [a, b] in pixels") from None


def _hf_tiling(data: dict[str, Any]) -> Tiling | None:
    """Raises UserError if a OneVision's vision_aspect_ratio is no anyres_max_N."""
    if data["model_type"] == "llava":
        return None
    tiling = _tiling(data, [0, 1], rounded=True)
    if data["model_type"] != "llava_onevision":
        return tiling
    aspect = data.get("vision_aspect_ratio", "anyres_max_9")
    most = re.fullmatch(r"anyres_max_([1-9]\d*)", aspect)
    if not most:
        raise UserError(f"vision_aspect_ratio {aspect!r} is not supported: anyres_max_9 (any number) is")
    return dataclasses.replace(tiling, max_tiles=int(most[1]), alone=True)


def _llava(data: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    """Fields of a Hugging Face model; keys that are left out have transformers' LlavaConfig defaults."""
    one_of("projector_hidden_act", data.get("projector_hidden_act", "gelu"), ("gelu",))
    if not data.get("multimodal_projector_bias", True):
        raise UserError("multimodal_projector_bias false is not supported: LLaVA's projector has a bias")
    select_layer = data.get("vision_feature_layer", -2)
    if not isinstance(select_layer, int):
        raise UserError(f"vision_feature_layer {select_layer} is not supported: one layer is")
    strategy = data.get("vision_feature_select_strategy", "default")
    text = dict(data.get("text_config") or {})
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or data.get("tie_word_embeddings"))
    vision = VisionConfig.from_hf(data["vision_config"]) if data.get("vision_config") else VisionConfig()
    image_id, video_id = HF_TYPES[data["model_type"]]
    stride = None
    if data["model_type"] == "llava_next_video":
        one_of("spatial_pool_mode", data.get("spatial_pool_mode", "average"), ("average",))
        stride = data.get("spatial_pool_stride", 2)
    keep = one_of("vision_feature_select_strategy", strategy, ("default", "full")) == "full"
    if not keep and not vision.class_tokens:
        raise UserError(
            "vision_feature_select_strategy 'default' cuts off a picture's first token as its class token, and a "
            f"{vision.kind} tower has none: 'full' is supported"
        )
    return {
        "vision": vision,
        "tiling": _hf_tiling(data),
        "text": TextConfig.from_hf(text),
        "select_layer": select_layer,
        "keep_class_token": keep and vision.class_tokens > 0,
        "image_aspect": "pad" if preprocessor.get("do_pad") else "square",
        "frame_stride": stride,
        "image_token_id": data.get("image_token_index", data.get("image_token_id", image_id)),
        "video_token_id": video_id and data.get("video_token_index", data.get("video_token_id", video_id)),
    }


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _template(text: TextConfig) -> str:
    """The conversations that LLaVA was trained with on such a language model; no checkpoint says it."""
    if text.family == "llama":
        return "llama_3" if text.vocab_size >= LLAMA_3_VOCABULARY else "vicuna_v1"
    return "mistral_instruct" if text.family == "mistral" else "qwen"
