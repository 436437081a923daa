"""A recipe: everything that a training run is told, as frozen dataclasses read from TOML or JSON.

A file has the tables ``[model]``, ``[data]``, ``[optimizer]``, ``[run]`` and ``[mesh]``; what it leaves out has the
default. The files in ``presets/`` go by their names.
"""

import dataclasses
import difflib
import json
import pathlib
import tomllib
import typing
from collections.abc import Iterable
from typing import Any, Literal

from pdrop_jax.errors import UserError

PRESETS = pathlib.Path(__file__).parent / "presets"


@dataclasses.dataclass(frozen=True)
class Model:
    """Where training starts and which part of it is trained."""

    start: str  # a checkpoint of ours
    groups: tuple[str, ...] = ("projector", "llm")  # of vision, projector, llm, lora
    layers: tuple[int, ...] | None = None  # drops; None is the checkpoint's own schedule
    ratios: tuple[float, ...] | None = None
    score: str = "pyramiddrop"  # what these drops choose by, a name in pdrop_jax.model.scores
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation
    remat: Literal["none", "dots", "full"] = "full"
    lora_rank: int = 0  # 0 is no adapters
    lora_alpha: float = 256.0
    lora_targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Data:
    """Conversations in LLaVA's JSON and the pictures that they speak of."""

    conversations: str  # JSON list or JSON lines
    images: str  # folder
    image_aspect: Literal["square", "pad", "anyres"] | None = None  # None is the checkpoint's own
    template: str = "vicuna_v1"
    max_length: int = 2048  # positions, images expanded
    too_long: Literal["cut", "skip"] = "cut"
    text_buckets: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)  # text slots of a batch
    group: bool = False  # batches of like modality and length
    broken: Literal["skip", "fail"] = "skip"
    workers: int = 0  # processes that read; 0 is threads


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and a cosine to zero. The defaults are LLaVA-1.5's finetuning.

    "muon" orthogonalizes the momentum of matrices (Jordan, 2024), scaled so that AdamW's rates suit it (Liu et al.,
    2025). Word embeddings, the head and what is no matrix are left to AdamW, with optax's Nesterov momentum.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-5
    vision_learning_rate: float | None = None  # None is learning_rate
    projector_learning_rate: float | None = None
    warmup: float = 0.03  # share of all steps
    weight_decay: float = 0.0  # never of norms and biases
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0  # of the gradient of all groups together
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second is float32


@dataclasses.dataclass(frozen=True)
class Run:
    """Where it is kept, how long it is, and in what portions."""

    folder: str  # of log, checkpoints and the trained model
    batch_size: int = 128  # rows of a step, all processes together
    accumulate: int = 1  # parts that a step's rows are cut into
    epochs: int = 1
    steps: int | None = None  # instead of epochs
    seed: int = 0
    save_every: int = 500  # steps
    keep_last: int = 2
    keep_every: int | None = None  # steps whose checkpoints stay for good
    log_every: int = 1


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; see ``pdrop_jax.sharding``."""

    data: int = 1
    fsdp: int | None = None  # None is all that the others leave
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    model: Model
    data: Data
    run: Run
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()


def load_recipe(path: str | pathlib.Path, settings: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
      path: a TOML or JSON file, or the name of a preset.
      settings: "part.key=value", value in TOML or plain text; they win over the file.

    Raises:
      UserError: the file cannot be read, a key is not known, missing or of another type.
    """
    presets = {preset.stem: preset for preset in PRESETS.glob("*.toml")}
    path = pathlib.Path(presets.get(str(path), path))
    if not (path.suffix or path.exists()):
        raise UserError(f"there is no preset {path} and no such file: there are {', '.join(sorted(presets))}")
    try:
        text = path.read_text()
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"the recipe {path} cannot be read: {error}") from None
    for setting in settings:
        name, equals, value = setting.partition("=")
        part, dot, key = name.partition(".")
        if not (equals and dot and isinstance(data, dict) and isinstance(data.setdefault(part, {}), dict)):
            raise UserError(f"--set {setting!r} is not of the form part.key=value")
        data[part][key] = _value(value)
    recipe = parse(Recipe, data, "")
    for name in ("accumulate", "epochs", "steps", "save_every", "keep_last", "keep_every", "log_every"):
        if (value := getattr(recipe.run, name)) is not None and value < 1:
            raise UserError(f"run.{name} is {value}, it must be at least 1")
    if recipe.run.keep_every and recipe.run.keep_every % recipe.run.save_every:
        raise UserError(
            f"run.keep_every is {recipe.run.keep_every}, no multiple of run.save_every, {recipe.run.save_every}"
        )
    return recipe


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse(kind: Any, value: Any, name: str) -> Any:
    """``value`` of a JSON or TOML file as ``kind``: a dataclass of this file or the type of one of its fields.

    Raises:
      UserError: it is none; ``name`` is the dotted key that the message gives.
    """
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(typing.cast(type, kind), value, name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{name} is {value!r}: choose {' or '.join(map(repr, arguments))}")
        return value
    if type(None) in arguments:
        return None if value is None else parse(arguments[0], value, name)
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{name} is {value!r}, expected a list")
        return tuple(parse(arguments[0], item, name) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} is {value!r}, expected {kind.__name__}")
    return value


def _parse_dataclass(kind: type, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{name or 'the recipe'} is {value!r}, expected a table")
    types = typing.get_type_hints(kind)
    prefix = f"{name}." if name else ""
    for key in value:
        if key not in types:
            near = difflib.get_close_matches(key, types, 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(types)}"
            raise UserError(f"the recipe has an unknown key {prefix}{key}: {hint}")
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in value
    ]
    if required:
        raise UserError(f"the recipe has no {', '.join(prefix + key for key in required)}")
    return kind(**{key: parse(types[key], item, prefix + key) for key, item in value.items()})


# What a run that goes on may do otherwise. Of the files that these name the contents must be the same.
FREE = (
    "run.folder",
    "run.save_every",
    "run.keep_last",
    "run.keep_every",
    "run.log_every",
    "data.workers",
    "data.conversations",
    "data.images",
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
