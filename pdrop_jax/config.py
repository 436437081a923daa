"""What a model is: three frozen dataclasses, read from either kind of config.json, saved as JSON with the schedule."""

import dataclasses
import json
import pathlib
import re
from typing import Any, Literal

from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

FORMAT = "pdrop-jax-1"
KNOWN_TOWER = "openai/clip-vit-large-patch14-336"  # what VisionConfig() describes


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer. The defaults are ViT-L/14 at 336 pixels, LLaVA-1.5's tower."""

    image_size: int = 336  # pixels
    patch_size: int = 14  # pixels
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    norm_eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    @property
    def patches_a_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_a_side**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_hf(cls, data: dict[str, Any]) -> "VisionConfig":
        """From a ``clip_vision_model`` config; keys that are left out have transformers' CLIPVisionConfig defaults."""
        kind = data.get("model_type", "clip_vision_model")
        if kind not in ("clip_vision_model", "clip"):
            raise UserError(f"vision model_type {kind!r} is not supported: clip_vision_model is")
        if kind == "clip":
            data = data.get("vision_config") or {}
        return cls(
            image_size=data.get("image_size", 224),
            patch_size=data.get("patch_size", 32),
            hidden_size=data.get("hidden_size", 768),
            intermediate_size=data.get("intermediate_size", 3072),
            num_layers=data.get("num_hidden_layers", 12),
            num_heads=data.get("num_attention_heads", 12),
            norm_eps=data.get("layer_norm_eps", 1e-5),
            activation=_one_of("hidden_act", data.get("hidden_act", "quick_gelu"), ("quick_gelu", "gelu")),
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "model_type": "clip_vision_model",
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": self.activation,
        }


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies, as in transformers: ``linear`` or ``llama3``."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    @classmethod
    def from_hf(cls, data: dict[str, Any] | None) -> "RopeScaling | None":
        kind = (data or {}).get("rope_type", (data or {}).get("type", "default"))
        if data is None or kind == "default":
            return None
        return cls(
            kind=_one_of("rope scaling", kind, ("linear", "llama3")),
            factor=float(data["factor"]),
            low_freq_factor=float(data.get("low_freq_factor", 1.0)),
            high_freq_factor=float(data.get("high_freq_factor", 4.0)),
            original_max_length=int(data.get("original_max_position_embeddings", 8192)),
        )

    def to_hf(self) -> dict[str, Any]:
        if self.kind == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_length,
        }


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A LLaMA-family decoder. The defaults are LLaMA-2-7B, the language model of LLaVA-1.5-7B."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention's output projection
    max_length: int = 4096  # positions

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads: not a multiple"
            )

    @classmethod
    def from_hf(cls, data: dict[str, Any]) -> "TextConfig":
        """From a LLaMA-family config; keys that are left out have transformers' LlamaConfig defaults."""
        _one_of("language model_type", data.get("model_type", "llama"), ("llama", "llava_llama"))
        _one_of("hidden_act", data.get("hidden_act", "silu"), ("silu",))
        if data.get("mlp_bias"):
            raise UserError("mlp_bias is not supported: LLaMA-family models of LLaVA have none")
        num_heads = data.get("num_attention_heads", 32)
        hidden_size = data.get("hidden_size", 4096)
        rope = data.get("rope_parameters") or {}
        return cls(
            vocab_size=data.get("vocab_size", 32000),
            hidden_size=hidden_size,
            intermediate_size=data.get("intermediate_size", 11008),
            num_layers=data.get("num_hidden_layers", 32),
            num_heads=num_heads,
            num_kv_heads=data.get("num_key_value_heads") or num_heads,
            head_dim=data.get("head_dim") or hidden_size // num_heads,
            rope_theta=float(rope.get("rope_theta", data.get("rope_theta", 10000.0))),
            rope_scaling=RopeScaling.from_hf(rope or data.get("rope_scaling")),
            norm_eps=data.get("rms_norm_eps", 1e-6),
            tie_embeddings=data.get("tie_word_embeddings", False),
            qkv_bias=data.get("attention_bias", False),
            output_bias=data.get("attention_bias", False),
            max_length=data.get("max_position_embeddings", 2048),
        )

    def to_hf(self) -> dict[str, Any]:
        if self.qkv_bias != self.output_bias:
            raise UserError("a LLaMA config has one attention_bias: q/k/v bias without output bias cannot be exported")
        return {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_hf() if self.rope_scaling else None,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.qkv_bias,
            "max_position_embeddings": self.max_length,
        }


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Pictures of any size as tiles, LLaVA-NeXT's anyres; see ``inputs.anyres``.

    Attributes:
      pinpoints: (height, width) pixels of the resolutions that a picture is resized into.
      max_tiles: of more features than those of so many tiles, fewer are made (OneVision's anyres_max_9); None is all.
      rounded: how many features a picture covers is rounded before it is truncated, as Hugging Face's code does.
    """

    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int | None = None
    rounded: bool = False

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
    keep_class_token: bool = False  # False is the feature selection "patch" (Hugging Face: "default")
    image_aspect: Literal["square", "pad"] = "square"
    tiling: Tiling | None = None  # None: a picture is one crop, made as image_aspect says
    template: str = "vicuna_v1"
    image_token_id: int | None = None  # id of "<image>" in a Hugging Face tokenizer; the original has none
    bos_token_id: int = 1
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
          data: ``llava_llama`` (the original LLaVA code's, also of LLaVA-NeXT), ``llava`` or ``llava_next`` (Hugging
            Face's).
          vision: the tower of a ``llava_llama`` model, whose own config only names it; may be left out for LLaVA-1.5's.
          generation: generation_config.json, whose end tokens win.
          preprocessor: preprocessor_config.json; a Hugging Face model says only there whether pictures are padded.
          schedule: without one the paper's if the decoder has layers enough, otherwise nothing is dropped.

        Raises:
          UserError: something that is not supported.
        """
        kind = _one_of("model_type", data.get("model_type"), ("llava_llama", "llava", "llava_next"))
        fields = _llava_llama(data, vision) if kind == "llava_llama" else _llava(data, preprocessor or {})
        text_data = data if kind == "llava_llama" else data.get("text_config") or {}
        text = fields["text"]
        bos = _first(text_data.get("bos_token_id"), 1)
        eos = _first((generation or {}).get("eos_token_id"), text_data.get("eos_token_id"), 2)
        if schedule is None:
            schedule = DropSchedule() if text.num_layers > DropSchedule().layers[-1] else DropSchedule.none()
        return cls(
            **fields,
            schedule=schedule,
            bos_token_id=bos,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
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
        path = pathlib.Path(folder) / "config.json"
        try:
            return cls.from_json(read_json(path))
        except (KeyError, TypeError) as error:  # a key that is missing, or one that no field has
            raise UserError(f"{path} is damaged, copy or convert it again: {error}") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in ``path``; UserError if it is missing or is none."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no checkpoint: it has no {path.name}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, expected a JSON object")
    return data


def _llava_llama(data: dict[str, Any], vision: VisionConfig | None) -> dict[str, Any]:
    """Fields of an original LLaVA model; keys that are left out have that code's defaults."""
    for key in ("mm_vision_select_layer", "mm_hidden_size"):
        if key not in data:
            raise UserError(f"config.json has no {key}: it is no complete llava_llama config")
    if data.get("mm_use_im_start_end"):
        raise UserError("mm_use_im_start_end is not supported: a picture stands between no marks in LLaVA-1.5")
    aspect = _one_of("image_aspect_ratio", data.get("image_aspect_ratio") or "square", ("square", "pad", "anyres"))
    merge = "spatial_unpad" if aspect == "anyres" else "flat"
    _one_of(f"with image_aspect_ratio {aspect}, mm_patch_merge_type", data.get("mm_patch_merge_type", "flat"), (merge,))
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
        "keep_class_token": _one_of("mm_vision_select_feature", feature, ("patch", "cls_patch")) == "cls_patch",
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


def _llava(data: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    """Fields of a Hugging Face model; keys that are left out have transformers' LlavaConfig defaults."""
    _one_of("projector_hidden_act", data.get("projector_hidden_act", "gelu"), ("gelu",))
    if not data.get("multimodal_projector_bias", True):
        raise UserError("multimodal_projector_bias false is not supported: LLaVA's projector has a bias")
    select_layer = data.get("vision_feature_layer", -2)
    if not isinstance(select_layer, int):
        raise UserError(f"vision_feature_layer {select_layer} is not supported: one layer is")
    strategy = data.get("vision_feature_select_strategy", "default")
    text = dict(data.get("text_config") or {})
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or data.get("tie_word_embeddings"))
    vision = data.get("vision_config")
    tiled = data["model_type"] == "llava_next"
    return {
        "vision": VisionConfig.from_hf(vision) if vision else VisionConfig(),
        "tiling": _tiling(data, [0, 1], rounded=True) if tiled else None,
        "text": TextConfig.from_hf(text),
        "select_layer": select_layer,
        "keep_class_token": _one_of("vision_feature_select_strategy", strategy, ("default", "full")) == "full",
        "image_aspect": "pad" if preprocessor.get("do_pad") else "square",
        "image_token_id": data.get("image_token_index", data.get("image_token_id", 32000)),
    }


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _one_of(what: str, value: Any, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise UserError(f"{what} {value!r} is not supported: {' or '.join(known)} is")
    return value
