"""Recipe: the full configuration of a training run, as frozen dataclasses read from TOML or JSON.

A file has the tables ``[model]``, ``[data]``, ``[optimizer]``, ``[run]``, ``[mesh]``, ``[validation]``,
``[evaluation]`` and ``[log]``; settings that it leaves out take their default. Files in ``presets/`` can be loaded by
name.
"""

import dataclasses
import os
import pathlib
import re
import tomllib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from pdrop_jax.config import Group, Projection, Remat
from pdrop_jax.errors import UserError
from pdrop_jax.eval.benchmarks import Benchmark
from pdrop_jax.io import parse_json, read_bytes
from pdrop_jax.schema import NO_OTHER_KEYS, Share, validated

PRESETS = pathlib.Path(__file__).parent / "presets"
RECIPE_BYTES = 2**14  # maximum size of a file; tomllib takes quadratic time on dotted keys
MOST_STEPS = 10_000_000  # the table of their learning rates takes 40 MB

ImageMode = Literal["focus", "standby", "both"]
Path = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
Name = Annotated[str, Field(max_length=64)]
Rate = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
# Values closer to 1 round to 1 in float32 and turn the moments into NaN.
Decay = Annotated[float, Field(ge=0, le=0.999999)]
Rows = Annotated[int, Field(ge=1, le=2**20)]
Positions = Annotated[int, Field(ge=1, le=2**20)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Layer = Annotated[int, Field(ge=0, le=1024)]
Devices = Annotated[int, Field(ge=1, le=2**16)]


@dataclasses.dataclass(frozen=True)
class ModelRecipe:
    """The starting checkpoint, the trained parameter groups, and how the model is computed."""

    __pydantic_config__ = NO_OTHER_KEYS

    start: Path  # checkpoint folder; `pdrop train` also takes a PyTorch one, or owner/name[@revision] on the Hub
    groups: Annotated[tuple[Group, ...], Field(min_length=1, max_length=6)] = ("projector", "llm")
    # Drop schedule: layers, ratios and score. If layers and ratios are None, the checkpoint's schedule is used.
    layers: Annotated[tuple[Layer, ...], Field(max_length=64)] | None = None
    ratios: Annotated[tuple[Share, ...], Field(max_length=64)] | None = None
    score: Name = "pyramiddrop"  # token-scoring function of this schedule, a name in pdrop_jax.model.scores
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # compute dtype
    remat: Remat = "full"
    lora_rank: Annotated[int, Field(ge=0, le=2**14)] = 0  # 0 disables LoRA
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 256.0
    lora_targets: Annotated[tuple[Projection, ...], Field(min_length=1, max_length=7)] = get_args(Projection)


@dataclasses.dataclass(frozen=True)
class SourceRecipe:
    """One data set of a mixture, written as a table ``[[data.sources]]``."""

    __pydantic_config__ = NO_OTHER_KEYS

    conversations: Path  # as data.conversations
    images: Path | None = None  # as data.images
    # Share of the rows of each epoch, relative to the other weights. Without weights, an epoch has each row once.
    weight: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    """Training data in any format of ``pdrop_jax.train.data.sources``: one data set, or a mixture of several."""

    __pydantic_config__ = NO_OTHER_KEYS

    conversations: Path | None = None  # a file, a folder of shards, or a pattern such as data/train-*.parquet
    images: Path | None = None  # folder that image names are relative to; None is the folder of the conversations
    sources: Annotated[tuple[SourceRecipe, ...], Field(max_length=256)] = ()  # in place of conversations and images
    outside_images: bool = False  # allow image names that leave the folder, such as ../1.png
    # "anyres" tiles pictures as LLaVA-NeXT does, "slices" as LLaVA-UHD; None keeps the checkpoint's setting.
    image_aspect: Literal["square", "pad", "anyres", "slices"] | None = None
    # What a picture is shown by: all its tokens, its standby tokens, or each in turn, with the mean of the two losses.
    image_mode: ImageMode = "focus"
    template: Name | None = None  # prompt template; None is the checkpoint's, "own" its own chat template
    max_length: Positions = 2048  # in tokens, including all image tokens
    too_long: Literal["truncate", "skip"] = "truncate"  # rows longer than max_length
    # Text lengths that batches are padded to; max_length is always added.
    text_buckets: Annotated[tuple[Positions, ...], Field(max_length=64)] = (64, 128, 256, 512, 1024, 2048)
    group_by_length: bool = False  # batch rows of the same modality and of similar length
    invalid: Literal["skip", "fail"] = "skip"  # records that cannot be used
    workers: Annotated[int, Field(ge=0, le=256)] = 0  # worker processes that load images; 0 uses threads

    def __post_init__(self) -> None:
        if self.sources and (self.conversations is not None or self.images is not None):
            raise UserError("data.sources replaces data.conversations and data.images: set one or the other")
        if not self.sources and self.conversations is None:
            raise UserError("data.conversations is not set: set it, or describe a mixture with [[data.sources]]")
        unweighted = [n for n, source in enumerate(self.sources) if source.weight is None]
        if 0 < len(unweighted) < len(self.sources):
            raise UserError(
                f"data.sources.{unweighted[0]} has no weight, but others have one: give all a weight, or none"
            )

    @property
    def all_sources(self) -> tuple[SourceRecipe, ...]:
        """The data sets of a mixture, or the only one."""
        return self.sources or (SourceRecipe(self.conversations or "", self.images),)

    @property
    def name(self) -> str:
        """How messages refer to the data."""
        return self.conversations or f"the mixture of {len(self.sources)} sources"


@dataclasses.dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW with linear warmup and cosine decay. The defaults are those of LLaVA-1.5 fine-tuning.

    "muon" orthogonalizes the momentum of weight matrices (Jordan, 2024) and scales the update so that AdamW learning
    rates can be reused (Liu et al., 2025). Token embeddings, the head and parameters that are not matrices are trained
    with AdamW, with optax's Nesterov momentum.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: Rate = 2e-5
    vision_learning_rate: Rate | None = None  # None uses learning_rate
    projector_learning_rate: Rate | None = None  # None uses learning_rate
    warmup: Share = 0.03  # fraction of all steps
    final_share: Share = 0.0  # fraction of each learning rate that the decay ends at
    weight_decay: Rate = 0.0  # not applied to norms and biases
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8
    clip_norm: Annotated[float, Field(ge=1e-9, le=1e9)] = 1.0  # global gradient norm over all groups
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the first moment; the second is always float32


@dataclasses.dataclass(frozen=True)
class RunRecipe:
    """Output folder, length, batch size, and checkpoint and logging intervals."""

    __pydantic_config__ = NO_OTHER_KEYS

    folder: Path  # for the log, the checkpoints and the trained model
    batch_size: Rows = 128  # global batch size in rows, over all processes
    grad_accum_steps: Rows = 1  # microbatches per step
    epochs: Steps = 1
    steps: Steps | None = None  # if given, overrides epochs
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    save_every: Steps = 500  # steps between checkpoints
    keep_last: Steps = 2  # number of recent checkpoints to keep
    keep_every: Steps | None = None  # keep the checkpoints of these steps permanently
    log_every: Steps = 1  # steps between log lines
    max_skipped: Steps = 10  # stop after this many consecutive steps with a non-finite gradient

    def __post_init__(self) -> None:
        if self.keep_every and self.keep_every % self.save_every:
            raise UserError(
                f"run.keep_every is {self.keep_every}: choose a multiple of run.save_every, {self.save_every}"
            )


@dataclasses.dataclass(frozen=True)
class MeshRecipe:
    """Devices along each mesh axis, see ``pdrop_jax.sharding``."""

    __pydantic_config__ = NO_OTHER_KEYS

    data: Devices = 1
    fsdp: Devices | None = None  # None uses all remaining devices
    tensor: Devices = 1


@dataclasses.dataclass(frozen=True)
class ValidationRecipe:
    """The loss on held-out conversations, computed during training. They are read as section ``data`` says."""

    __pydantic_config__ = NO_OTHER_KEYS

    conversations: Path | None = None  # None: no validation
    images: Path | None = None  # None uses data.images
    every: Steps = 500  # steps between validations; the last step is always validated
    batches: Steps = 16  # batches of run.batch_size / run.grad_accum_steps rows, the same ones every time


@dataclasses.dataclass(frozen=True)
class EvaluationRecipe:
    """A question file that is answered during training, greedily, and scored as ``pdrop score`` does."""

    __pydantic_config__ = NO_OTHER_KEYS

    questions: Path | None = None  # question file, as for pdrop eval; None: no evaluation
    images: Path | None = None  # None uses data.images
    benchmark: Benchmark | None = None
    annotations: Path | None = None  # file or folder with the annotations of these questions
    split: Name = "test"  # for scienceqa
    every: Steps = 500  # steps between evaluations; the last step is always evaluated
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8  # questions per batch
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 16

    def __post_init__(self) -> None:
        if len({x is None for x in (self.questions, self.benchmark, self.annotations)}) > 1:
            raise UserError(
                "evaluation.questions, evaluation.benchmark and evaluation.annotations must be given together: "
                "set all three or none"
            )


@dataclasses.dataclass(frozen=True)
class LogRecipe:
    """Where a run reports besides its log file and TensorBoard."""

    __pydantic_config__ = NO_OTHER_KEYS

    print_every: Steps = 20  # steps between lines on stderr if it is not a terminal, which has a progress bar instead
    # Project of Weights & Biases, "project" or "entity/project"; None: not used.
    wandb: Annotated[str, Field(pattern=r"^([\w.-]{1,64}/)?[\w.-]{1,128}$")] | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All sections of a recipe."""

    __pydantic_config__ = NO_OTHER_KEYS

    model: ModelRecipe
    data: DataRecipe
    run: RunRecipe
    optimizer: OptimizerRecipe = OptimizerRecipe()
    mesh: MeshRecipe = MeshRecipe()
    validation: ValidationRecipe = ValidationRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    log: LogRecipe = LogRecipe()


def load_recipe(path: str | pathlib.Path, settings: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
      path: a TOML or JSON file, or the name of a preset.
      settings: overrides of the form "section.key=value", where the value is TOML or plain text.

    Raises:
      UserError: the file cannot be read, or a key is unknown, missing, of the wrong type or out of range.
    """
    presets = {preset.stem: preset for preset in PRESETS.glob("*.toml")}
    path = pathlib.Path(presets.get(str(path), path))
    if not (path.suffix in (".toml", ".json") or path.name != str(path) or os.path.lexists(path)):
        raise UserError(f"{path} is neither a preset nor a file: the presets are {', '.join(sorted(presets))}")
    name = f"the recipe {path.stem if path in presets.values() else path}"
    data = _read(path, name)
    for setting in settings:
        key, equals, value = setting.partition("=")
        section, dot, key = key.partition(".")
        if not (equals and dot and isinstance(data.setdefault(section, {}), dict)):
            raise UserError(f"--set {setting!r} is not of the form section.key=value")
        if not _is_text(setting):
            raise UserError(f"--set {setting!r} is not valid UTF-8")
        data[section][key] = _value(value)
    return validated(Recipe, data, name)


def _read(path: pathlib.Path, name: str) -> dict[str, Any]:
    content = read_bytes(path, RECIPE_BYTES)
    if path.suffix == ".json":
        data = parse_json(content, name)
        if not isinstance(data, dict):
            raise UserError(f"{name} contains a {type(data).__name__}, expected a JSON object")
        return data
    try:
        return tomllib.loads(content.decode())
    except RecursionError:
        raise UserError(f"{name} is malformed: it is nested too deeply") from None
    except ValueError as error:  # malformed TOML, bytes that are not UTF-8, or integers with too many digits
        raise UserError(f"{name} is malformed: {error}") from None


def _is_text(text: str) -> bool:
    """False for a command line argument that is not valid UTF-8, which Python decodes to lone surrogates."""
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
    """Validates a recipe that may have been built in Python; raises UserError if a value is not allowed."""
    return validated(Recipe, dataclasses.asdict(recipe), where)


# Settings that may change when a run is resumed. The contents of the files that they name must stay the same.
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
    "data.sources.conversations",
    "data.sources.images",
    "model.start",
)
FREE_SECTIONS = ("mesh", "validation", "evaluation", "log")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that differ between two recipes and may not change on resume, as text; see ``dataclasses.asdict``."""
    before, after = (
        {name: x for section in recipe for name, x in _flat(section, recipe[section])} for recipe in (old, new)
    )
    return [
        f"{name} was {before.get(name)!r} and is now {after.get(name)!r}"
        for name in {**before, **after}
        if not _is_free(name) and before.get(name) != after.get(name)
    ]


def _is_free(name: str) -> bool:
    return name.partition(".")[0] in FREE_SECTIONS or re.sub(r"\.\d+", "", name) in FREE


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting in a section, including those of the tables in a list."""
    if isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(f"{name}.{key}", inner)
