"""A recipe: everything that a training run is told, as frozen dataclasses read from TOML or JSON.

A file has the tables ``[model]``, ``[data]``, ``[optimizer]``, ``[run]`` and ``[mesh]``; what it leaves out has the
default. The files in ``presets/`` go by their names.
"""

import dataclasses
import pathlib
import tomllib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from pdrop_jax.errors import UserError
from pdrop_jax.io import parse_json, read_bytes
from pdrop_jax.schema import NO_OTHER_KEYS, Share, validated

PRESETS = pathlib.Path(__file__).parent / "presets"
RECIPE_BYTES = 2**14  # of a file; tomllib takes time by the square of a dotted key
MOST_STEPS = 10_000_000  # the table of their learning rates takes 40 MB

Path = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
Name = Annotated[str, Field(max_length=64)]
Rate = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, le=0.999999)]  # nearer to 1 is 1 in float32, and the moments would be NaN
Rows = Annotated[int, Field(ge=1, le=2**20)]
Positions = Annotated[int, Field(ge=1, le=2**20)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Layer = Annotated[int, Field(ge=0, le=1024)]
Devices = Annotated[int, Field(ge=1, le=2**16)]
Group = Literal["vision", "projector", "llm", "lora"]
Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclasses.dataclass(frozen=True)
class ModelRecipe:
    """Where training starts and which part of it is trained."""

    __pydantic_config__ = NO_OTHER_KEYS

    start: Path  # a checkpoint of ours
    groups: Annotated[tuple[Group, ...], Field(min_length=1, max_length=4)] = ("projector", "llm")
    # Drops; None is the checkpoint's own schedule.
    layers: Annotated[tuple[Layer, ...], Field(max_length=64)] | None = None
    ratios: Annotated[tuple[Share, ...], Field(max_length=64)] | None = None
    score: Name = "pyramiddrop"  # what these drops choose by, a name in pdrop_jax.model.scores
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation
    remat: Literal["none", "dots", "full"] = "full"
    lora_rank: Annotated[int, Field(ge=0, le=2**14)] = 0  # 0 is no adapters
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 256.0
    lora_targets: Annotated[tuple[Target, ...], Field(min_length=1, max_length=7)] = get_args(Target)


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    """Conversations in LLaVA's JSON and the pictures that they speak of."""

    __pydantic_config__ = NO_OTHER_KEYS

    conversations: Path  # JSON list or JSON lines
    images: Path  # folder
    outside_images: bool = False  # whether a record may name a picture that is not in that folder, as ../1.png
    image_aspect: Literal["square", "pad", "anyres"] | None = None  # None is the checkpoint's own
    template: Name = "vicuna_v1"
    max_length: Positions = 2048  # images expanded
    too_long: Literal["truncate", "skip"] = "truncate"
    # Text slots of a batch.
    text_buckets: Annotated[tuple[Positions, ...], Field(max_length=64)] = (64, 128, 256, 512, 1024, 2048)
    group_by_length: bool = False  # batches of like modality and length
    invalid: Literal["skip", "fail"] = "skip"
    workers: Annotated[int, Field(ge=0, le=256)] = 0  # processes that read; 0 is threads


@dataclasses.dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW with linear warm-up and a cosine to zero. The defaults are LLaVA-1.5's finetuning.

    "muon" orthogonalizes the momentum of matrices (Jordan, 2024), scaled so that AdamW's rates suit it (Liu et al.,
    2025). Word embeddings, the head and what is no matrix are left to AdamW, with optax's Nesterov momentum.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: Rate = 2e-5
    vision_learning_rate: Rate | None = None  # None is learning_rate
    projector_learning_rate: Rate | None = None
    warmup: Share = 0.03  # of all steps
    weight_decay: Rate = 0.0  # never of norms and biases
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8
    clip_norm: Annotated[float, Field(ge=1e-9, le=1e9)] = 1.0  # of the gradient of all groups together
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second is float32


@dataclasses.dataclass(frozen=True)
class RunRecipe:
    """Where it is kept, how long it is, and in what portions."""

    __pydantic_config__ = NO_OTHER_KEYS

    folder: Path  # of log, checkpoints and the trained model
    batch_size: Rows = 128  # of a step, all processes together
    grad_accum_steps: Rows = 1  # parts that a step's rows are cut into
    epochs: Steps = 1
    steps: Steps | None = None  # instead of epochs
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    save_every: Steps = 500
    keep_last: Steps = 2  # checkpoints
    keep_every: Steps | None = None  # the checkpoints of these stay for good
    log_every: Steps = 1
    max_skipped: Steps = 10  # in a row for a gradient that is not finite; then the run stops

    def __post_init__(self) -> None:
        if self.keep_every and self.keep_every % self.save_every:
            raise UserError(f"run.keep_every is {self.keep_every}, no multiple of run.save_every, {self.save_every}")


@dataclasses.dataclass(frozen=True)
class MeshRecipe:
    """Devices along each axis; see ``pdrop_jax.sharding``."""

    __pydantic_config__ = NO_OTHER_KEYS

    data: Devices = 1
    fsdp: Devices | None = None  # None is all that the others leave
    tensor: Devices = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    __pydantic_config__ = NO_OTHER_KEYS

    model: ModelRecipe
    data: DataRecipe
    run: RunRecipe
    optimizer: OptimizerRecipe = OptimizerRecipe()
    mesh: MeshRecipe = MeshRecipe()


def load_recipe(path: str | pathlib.Path, settings: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
      path: a TOML or JSON file, or the name of a preset.
      settings: "part.key=value", value in TOML or plain text; they win over the file.

    Raises:
      UserError: the file cannot be read, a key is not known, missing, of another type or out of its range.
    """
    presets = {preset.stem: preset for preset in PRESETS.glob("*.toml")}
    path = pathlib.Path(presets.get(str(path), path))
    if not (path.suffix or path.exists()):
        raise UserError(f"there is no preset {path} and no such file: there are {', '.join(sorted(presets))}")
    name = f"the recipe {path.stem if path in presets.values() else path}"
    data = _read(path, name)
    for setting in settings:
        key, equals, value = setting.partition("=")
        part, dot, key = key.partition(".")
        if not (equals and dot and isinstance(data.setdefault(part, {}), dict)):
            raise UserError(f"--set {setting!r} is not of the form part.key=value")
        if not _is_text(setting):
            raise UserError(f"--set {setting!r} is not valid UTF-8")
        data[part][key] = _value(value)
    return validated(Recipe, data, name)


def _read(path: pathlib.Path, name: str) -> dict[str, Any]:
    content = read_bytes(path, RECIPE_BYTES)
    if path.suffix == ".json":
        data = parse_json(content, name)
        if not isinstance(data, dict):
            raise UserError(f"{name} holds a {type(data).__name__}, expected an object")
        return data
    try:
        return tomllib.loads(content.decode())
    except RecursionError:
        raise UserError(f"{name} is malformed: it is nested too deeply") from None
    except ValueError as error:  # of malformed TOML, of bytes that are not UTF-8, and of too many digits
        raise UserError(f"{name} is malformed: {error}") from None


def _is_text(text: str) -> bool:
    """Not so of an argument that was no UTF-8: Python has lone surrogates for its bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def checked(recipe: Recipe, where: str = "the recipe") -> Recipe:
    """``recipe``, which nothing may have read from a file, if all its values are allowed; UserError otherwise."""
    return validated(Recipe, dataclasses.asdict(recipe), where)


# What a run that goes on may do otherwise. Of the files that these name the contents must be the same.
FREE = (
    "run.folder",
    "run.save_every",
    "run.keep_last",
    "run.keep_every",
    "run.log_every",
    "run.max_skipped",
    "data.workers",
    "data.conversations",
    "data.images",
    "data.outside_images",
    "model.start",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a run that goes on would do otherwise than it began, as text; recipes as ``dataclasses.asdict`` has them."""
    before, after = (
        {f"{part}.{key}": x for part in recipe for key, x in recipe[part].items()} for recipe in (old, new)
    )
    return [
        f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in {**before, **after}
        if key not in FREE and before.get(key) != after.get(key)
    ]
