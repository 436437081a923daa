"""The model config: frozen dataclasses, saved as JSON together with the drop schedule."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag

from pdrop_jax.errors import UserError
from pdrop_jax.families.gemma3.config import GemmaSize, GemmaVisionConfig, gemma3_text
from pdrop_jax.families.internvl import config as internvl
from pdrop_jax.families.internvl.config import TiledVisionConfig, TilesKind
from pdrop_jax.families.qwen2_vl import config as qwen2_vl
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.families.qwen3_vl import config as qwen3_vl
from pdrop_jax.families.smolvlm import config as smolvlm
from pdrop_jax.io import UNFINISHED, read_json
from pdrop_jax.paths import as_path, in_bucket, why_missing
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.schema import NO_OTHER_KEYS, TokenId, validated
from pdrop_jax.text_config import CacheDtype as CacheDtype
from pdrop_jax.text_config import Family as Family
from pdrop_jax.text_config import RopeScaling as RopeScaling
from pdrop_jax.text_config import TextConfig as TextConfig
from pdrop_jax.vision_config import MAX_TILES as MAX_TILES
from pdrop_jax.vision_config import Activation as Activation
from pdrop_jax.vision_config import EarlyCompression as EarlyCompression
from pdrop_jax.vision_config import StandbyConfig as StandbyConfig
from pdrop_jax.vision_config import Tiling as Tiling
from pdrop_jax.vision_config import VisionConfig as VisionConfig

FORMAT = "pdrop-jax-1"
# Required in every config.json: their defaults would be those of another model.
ALWAYS_THERE = {
    "vision": ("hidden_size", "num_layers"),
    "text": ("vocab_size", "hidden_size", "num_layers"),
    "schedule": ("layers", "ratios"),
}
MAX_PROJECTOR_LAYERS = 16


# Choices of the model code that the command line and recipes offer too, without importing jax.
Implementation = Literal["auto", "xla", "blocked", "cudnn", "splash"]  # of attention, see ``model.attention``
Remat = Literal["none", "dots", "full"]  # what a layer keeps for its gradient, see ``model.layers.rematerialise``
Quantization = Literal["int8", "int4", "w8a8", "w4a8", "w4a4"]  # of the decoder, see ``model.quantization``
# Parts of the model that are trained together
Group = Literal["vision", "compressor", "standby", "projector", "llm", "lora"]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]  # of a decoder layer; each may carry a LoRA adapter


def _tower_class(tower: Any) -> str:
    """The class of a vision tower, or of the one that a JSON object describes."""
    if not isinstance(tower, dict):
        return type(tower).__name__
    if "tokens_a_side" in tower:
        return GemmaVisionConfig.__name__
    kind = str(tower.get("kind"))
    if kind in get_args(TilesKind):
        return TiledVisionConfig.__name__
    return QwenVisionConfig.__name__ if kind.startswith("qwen") else VisionConfig.__name__


Tower = Annotated[
    Annotated[VisionConfig, Tag("VisionConfig")]
    | Annotated[GemmaVisionConfig, Tag("GemmaVisionConfig")]
    | Annotated[TiledVisionConfig, Tag("TiledVisionConfig")]
    | Annotated[QwenVisionConfig, Tag("QwenVisionConfig")],
    Discriminator(_tower_class),
]


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA model, or one of another family, with its drop schedule.

    The defaults are LLaVA-1.5-7B with the paper's schedule.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    vision: Tower = VisionConfig()
    text: TextConfig = TextConfig()
    schedule: DropSchedule = DropSchedule()
    projector_layers: Annotated[int, Field(ge=1, le=MAX_PROJECTOR_LAYERS)] = 2  # 1 is ``linear``, n is ``mlp{n}x_gelu``
    select_layer: int = -2  # hidden state of the vision tower that is projected; -1 is its last layer's output
    keep_class_token: bool = False  # CLIP's: False is the feature selection "patch" (Hugging Face: "default")
    image_aspect: Literal["square", "pad"] = "square"
    tiling: Tiling | None = None  # None: a picture is one crop, made as image_aspect says
    # A video's frames are averaged over squares of so many features a side before the projector, as in Hugging Face's
    # LLaVA-NeXT-Video; None: their features are resized to half a side behind it.
    frame_stride: int | None = None
    standby: StandbyConfig | None = None  # the tower's standby tokens, for what is shown with mode "standby"
    template: str = "vicuna_v1"  # "own" is the chat template in the checkpoint's folder, see inputs.prompts
    image_token_id: TokenId | None = None  # id of "<image>" in a Hugging Face tokenizer; the original has none
    video_token_id: TokenId | None = None  # id of "<video>", likewise
    bos_token_id: TokenId | None = 1  # None: a text begins with nothing, as Qwen2's
    eos_token_ids: tuple[TokenId, ...] = (2,)

    def __post_init__(self) -> None:
        if not 1 <= self.vision_layers <= self.vision.num_layers:
            raise UserError(
                f"select_layer {self.select_layer} names no hidden state of a vision tower of "
                f"{self.vision.num_layers} layers"
            )
        self._check_compression()
        if isinstance(self.vision, VisionConfig):
            self._check_crops(self.vision)
        if self.standby and self.family != "LLaVA":
            raise UserError(f"standby tokens are for LLaVA's towers, but this model is of the family {self.family}")
        if self.standby and (self.vision.early_compression or self.crop_tower.merge_size > 1):
            raise UserError("standby tokens and a compressed vision tower do not go together: choose one")
        self.schedule.check(self.text.num_layers)
        if self.schedule.positions == "auto":
            positions: Literal["dense", "original"] = "original" if self.text.mrope_sections else "dense"
            object.__setattr__(self, "schedule", dataclasses.replace(self.schedule, positions=positions))

        if self.additions > self.text.num_layers:
            raise UserError(
                f"{self.additions} layers of the vision tower are added behind the decoder's first layers, but it has "
                f"{self.text.num_layers}"
            )

    def _check_compression(self) -> None:
        compression = self.vision.early_compression
        if compression and isinstance(self.vision, VisionConfig) and self.family != "LLaVA":
            raise UserError(
                f"early compression is for CLIP, SigLIP and Qwen towers, but this model's is {self.vision.kind}"
            )
        if compression and compression.after >= self.vision_layers - 1:
            last = self.vision_layers - 1
            raise UserError(
                f"early compression after layer {compression.after} leaves no layer behind it: the vision tower runs "
                f"layers 0 to {last}" + (f", choose one of 0 to {last - 1}" if last else "")
            )

    def _check_crops(self, vision: VisionConfig) -> None:
        tile = vision.image_size
        if self.tiling and (
            not self.tiling.pinpoints or any(n < tile or n % tile for point in self.tiling.pinpoints for n in point)
        ):
            raise UserError(
                f"pictures cannot be tiled into {list(self.tiling.pinpoints)}: each side must be a multiple of the "
                f"{tile} pixels of the vision tower"
            )
        if self.tiling and self.keep_class_token:
            raise UserError("tiles with class tokens are not supported: the feature selection must be patch")
        if self.keep_class_token and vision.merge_size > 1 and self.family == "LLaVA":
            raise UserError(
                f"a class token cannot be merged with others, but squares of {vision.merge_size} features a side are: "
                "the feature selection must be patch"
            )
        if self.keep_class_token and not vision.class_tokens:
            raise UserError(f"a {vision.kind} tower has no class token to keep")
        if self.frame_stride is not None and not 1 <= self.frame_stride <= vision.features_a_side:
            raise UserError(
                f"frames of {vision.features_a_side} features a side cannot be averaged over {self.frame_stride}"
            )

    @property
    def family(self) -> str:
        """The family beside LLaVA that the model belongs to, or "LLaVA"."""
        return self.vision.family

    @property
    def crop_tower(self) -> VisionConfig:
        """The vision tower, for what supports only towers that take square crops.

        Raises:
          UserError: it takes grids of patches.
        """
        if not isinstance(self.vision, VisionConfig):
            raise UserError(
                f"this is supported for models with a CLIP or SigLIP tower only, but this model's is {self.vision.kind}"
            )
        return self.vision

    @property
    def vision_layers(self) -> int:
        """Layers of the vision tower that run."""
        if self.select_layer < 0:
            return self.vision.num_layers + 1 + self.select_layer
        return self.select_layer

    @property
    def additions(self) -> int:
        """The first so many decoder layers have features added to the image tokens behind them (DeepStack)."""
        return len(self.vision.deepstack_layers)

    @property
    def image_tokens(self) -> int:
        """Features of one crop, which are its tokens unless images are tiled."""
        return self.crop_tower.features_a_side**2 + self.keep_class_token

    @property
    def frame_tokens(self) -> int:
        """Further features of a crop as a frame of a video, if those are averaged before the projector."""
        return (self.crop_tower.features_a_side // self.frame_stride) ** 2 if self.frame_stride else 0

    @property
    def standby_tokens(self) -> int:
        """Tokens of a crop that is shown with mode "standby"."""
        return self.standby.tokens if self.standby else 0

    @property
    def features_per_token(self) -> int:
        """Number of features that a token may be interpolated from."""
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
    def qwen2_5_vl(cls, size: Literal["3b", "7b", "32b", "72b"]) -> "LlavaConfig":
        """Qwen2.5-VL as released. PyramidDrop's authors have no schedule for its depths: it drops at their quarters."""
        return cls._qwen(*qwen2_vl.released(size))

    @classmethod
    def qwen3_vl(cls, size: Literal["2b", "4b", "8b", "32b"]) -> "LlavaConfig":
        """Qwen3-VL as released, with drops at the quarters of its depth."""
        return cls._qwen(*qwen3_vl.released(size))

    @classmethod
    def _qwen(cls, text: TextConfig, vision: QwenVisionConfig) -> "LlavaConfig":
        tokens = {"image_token_id": 151655, "video_token_id": 151656, "bos_token_id": 151643}
        return cls.released(text, vision, **tokens, eos_token_ids=(151645, 151643))

    @classmethod
    def gemma3(cls, size: GemmaSize) -> "LlavaConfig":
        """Gemma 3 as released, with drops at the global layers nearest to the quarters of its depth."""
        tokens = {"image_token_id": 262144, "bos_token_id": 2, "eos_token_ids": (1, 106)}
        return cls.released(gemma3_text(size), GemmaVisionConfig(), projector_layers=1, **tokens)

    @classmethod
    def released(cls, text: TextConfig, vision: Tower, **fields: Any) -> "LlavaConfig":
        """A model of a family beside LLaVA, with drops at the quarters of its depth."""
        schedule = DropSchedule.quarters(text.num_layers, text.full_layers)
        own: dict[str, Any] = {"schedule": schedule, "select_layer": -1, "template": "own"}
        return cls(vision=vision, text=text, **own, **fields)

    def with_cache_dtype(self, dtype: CacheDtype | None) -> "LlavaConfig":
        """The same model with quantized KV caches, or with plain ones."""
        return dataclasses.replace(self, text=dataclasses.replace(self.text, cache_dtype=dtype))

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        del data["text"]["cache_dtype"]  # chosen when a model is loaded, as the dtype is
        data["schedule"] = self.schedule.to_json()
        return {"format": FORMAT, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str = "config.json") -> "LlavaConfig":
        """The inverse of ``to_json``. Keys newer than the checkpoint have their defaults.

        Args:
          where: how error messages refer to the file.

        Raises:
          UserError: another format, a key that is unknown or missing, a value of the wrong type or out of range.
        """
        if data.get("format") != FORMAT:
            raise UserError(
                f"{where} has format {data.get('format')!r}, expected {FORMAT!r}: a PyTorch checkpoint must be "
                "converted first, pdrop convert SRC OUT"
            )
        damaged = f"{where} is damaged, copy or convert it again"
        for section, keys in ALWAYS_THERE.items():
            found = data.get(section)
            missing = [key for key in keys if key not in found] if isinstance(found, dict) else [section]
            if missing:
                raise UserError(f"{damaged}: it has no {' and '.join(missing)}")
        try:
            return validated(cls, {key: value for key, value in data.items() if key != "format"}, "config.json")
        except UserError as error:
            raise UserError(f"{damaged}: {error}") from None

    def save(self, folder: pathlib.Path) -> None:
        (folder / "config.json").write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: pathlib.Path) -> "LlavaConfig":
        """Raises UserError if ``folder`` contains no config.json of pdrop-jax."""
        folder = as_path(folder)
        return cls.from_json(read_config(folder), str(folder / "config.json"))


def _released(family: ModuleType, size: str) -> LlavaConfig:
    fields = family.released_fields(size)
    return LlavaConfig.released(family.released_text(size), family.released_tower(size), **fields)


MODELS: dict[str, Callable[[], LlavaConfig]] = {
    "llava-1.5-7b": LlavaConfig.llava_1_5_7b,
    "llava-1.5-13b": LlavaConfig.llava_1_5_13b,
    "llava-next-7b": LlavaConfig.llava_next_7b,
    "llava-next-13b": LlavaConfig.llava_next_13b,
    **{f"gemma-3-{size}": functools.partial(LlavaConfig.gemma3, size) for size in ("4b", "12b", "27b")},
    **{f"internvl{size}": functools.partial(_released, internvl, size) for size in get_args(internvl.Size)},
    **{f"smolvlm2-{size}": functools.partial(_released, smolvlm, size) for size in get_args(smolvlm.Size)},
    "qwen2.5-vl-3b": functools.partial(LlavaConfig.qwen2_5_vl, "3b"),
    "qwen2.5-vl-7b": functools.partial(LlavaConfig.qwen2_5_vl, "7b"),
    "qwen2.5-vl-32b": functools.partial(LlavaConfig.qwen2_5_vl, "32b"),
    "qwen2.5-vl-72b": functools.partial(LlavaConfig.qwen2_5_vl, "72b"),
    "qwen3-vl-2b": functools.partial(LlavaConfig.qwen3_vl, "2b"),
    "qwen3-vl-4b": functools.partial(LlavaConfig.qwen3_vl, "4b"),
    "qwen3-vl-8b": functools.partial(LlavaConfig.qwen3_vl, "8b"),
    "qwen3-vl-32b": functools.partial(LlavaConfig.qwen3_vl, "32b"),
}


def config_of(model: str) -> LlavaConfig:
    """The config of one of ``MODELS`` or of a checkpoint folder; UserError if it is neither."""
    return MODELS[model]() if model in MODELS else LlavaConfig.load(as_path(model))


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The JSON object in the config.json of any checkpoint; UserError if there is none."""
    path = folder / "config.json"
    if not path.exists():
        if in_bucket(folder) and (folder / UNFINISHED).exists():
            raise UserError(f"{folder} has not been written completely: run the command that writes it again")
        raise UserError(f"{folder} is not a checkpoint: {why_missing(path, 'it has no config.json')}")
    return read_json(path)
