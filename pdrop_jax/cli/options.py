"""Options that several subcommands share, each declared once, and progress messages on a terminal."""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import tyro

from pdrop_jax.config import CacheDtype, Implementation, Quantization
from pdrop_jax.errors import UserError
from pdrop_jax.eval.shares import Share
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.paths import as_path
from pdrop_jax.schedule import PRESETS

IMAGE_BYTES = 2**29  # that are read from stdin


def _option(text: str, metavar: str | None = None, default: str = "", name: str | None = None) -> Any:
    """An option's help text; ``default`` is shown in place of Python's notation of the default value."""
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=default and f"(default: {default})", name=name)


def unset(metavar: str | None = None, default: str = "", name: str | None = None) -> Any:
    """The annotation of an option that may be left out, so that --help does not say "(default: None)"."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default and f"(default: {default})", name=name)


File = Annotated[pathlib.Path | None, unset("FILE")]
Images = Annotated[tuple[str, ...], unset("FILE [FILE …]")]
Source = Annotated[str | None, unset("DIR|ID")]  # a folder or a Hub id
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, unset()]


QUANTIZATIONS = f"{{{','.join(get_args(Quantization))}}}"
LAYERS = f"N [N …]|none|{'|'.join(PRESETS)}"

Layers = Annotated[
    tuple[str, ...] | None,
    _option(
        'Drop image tokens after this many decoder layers have run, or a preset; "none" drops nothing.',
        LAYERS,
        "the model's own schedule",
    ),
]
Ratios = Annotated[
    tuple[float, ...] | None,
    _option(
        "Share of an image's original tokens kept after each drop; one for each of --layers.",
        "R [R …]",
        "the model's own schedule",
    ),
]
Score = Annotated[
    str | None, _option("Token-scoring function: a name in pdrop_jax.model.scores.", "NAME", "the schedule's")
]
Model = Annotated[
    str | None,
    _option(
        "A converted or trained model, or a PyTorch checkpoint, which is converted when it is first used: a folder, "
        "or OWNER/NAME[@REVISION] on the Hugging Face Hub.",
        "DIR|ID",
        "the demo model that comes with the package",
    ),
]
ConfigModel = Annotated[
    str,
    _option(
        "llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-next-13b, qwen2.5-vl-3b to -72b, qwen3-vl-2b to -32b, "
        "gemma-3-4b to -27b, internvl3-1b to -78b, internvl3.5-1b to -38b, smolvlm2-256m to -2.2b, or a checkpoint of "
        "which only the config is read: a folder, or OWNER/NAME[@REVISION] on the Hugging Face Hub.",
        "NAME|DIR|ID",
        "llava-1.5-7b",
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None, _option("Compute dtype.", "{float32,bfloat16}", "the checkpoint's")
]
Quantize = Annotated[
    Quantization | None,
    _option(
        "Quantize the decoder's linear layers: int8 and int4 their weights, w8a8, w4a8 and w4a4 also what they are "
        "applied to, each token with a scale of its own.",
        QUANTIZATIONS,
        "no",
    ),
]
QuantizeCache = Annotated[
    CacheDtype | None,
    _option("Quantize the KV caches, with a scale for each token and head.", "{int8,int4}", "no"),
]
Attention = Annotated[
    Implementation,
    _option("Attention implementation.", None, "auto"),
]
Mesh = Annotated[
    tuple[str, ...],
    _option("Size of each device mesh axis: data, fsdp, tensor.", "AXIS=N [AXIS=N …]", "one device"),
]
NoVerify = Annotated[
    bool, tyro.conf.FlagCreatePairsOff, _option("Load the weights without comparing them with their checksums.")
]
OutsideImages = Annotated[
    bool, tyro.conf.FlagCreatePairsOff, _option('Allow images outside the --images folder, such as "../1.png".')
]
Processes = Annotated[
    int | None,
    _option(
        "Number of processes that share the questions, each on devices of its own and with the same command.",
        "N",
        "SLURM's, or 1",
        "num-processes",
    ),
]
Process = Annotated[int | None, _option("Number of this process, from 0.", "N", "SLURM's, or 0", "process-id")]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, _option("Print one JSON object instead of text.", name="json")]
CompressVision = Annotated[
    int | None,
    _option(
        "Make one of every 2 x 2 patches inside the vision tower, behind its layer K counted from 0 (LLaVA-UHD v4: 6). "
        "The new weights are made of that layer's, so the model has to be trained.",
        "K",
        "the model's own",
    ),
]
MergeSize = Annotated[
    int | None,
    _option(
        "Join squares of N x N features of a CLIP or SigLIP tower to one token.",
        "N",
        "the model's own, 2 with --compress-vision",
    ),
]
SamplingOptions = Annotated[Sampling, tyro.conf.arg(name="")]  # --max-new-tokens, --temperature, …


def compressed(config: Any, after: int | None, merge_size: int | None) -> Any:
    """A ``LlavaConfig`` with what --compress-vision and --merge-size ask for."""
    from pdrop_jax.model.compression import with_compression
    from pdrop_jax.vision_config import EarlyCompression

    for option, number, least in (("--compress-vision", after, 0), ("--merge-size", merge_size, 1)):
        if number is not None and number < least:
            raise UserError(f"{option} must be at least {least}, got {number}")
    if (after, merge_size) == (None, None):
        return config
    return with_compression(config, None if after is None else EarlyCompression(after), merge_size)


def mesh_sizes(mesh: tuple[str, ...]) -> dict[str, int]:
    """Devices along each axis of ``--mesh data=1 fsdp=8 tensor=1``."""
    try:
        sizes = {axis: int(size) for axis, size in (item.split("=") for item in mesh)}
        if len(sizes) < len(mesh):
            raise ValueError
        return sizes
    except ValueError:
        raise UserError(f"--mesh takes axes with their sizes, such as fsdp=8 tensor=2, got {' '.join(mesh)}") from None


def device_mesh(mesh: tuple[str, ...]) -> Any:
    """The mesh of ``--mesh``; None, which is one device, if the option is left out."""
    if not mesh:
        return None
    from pdrop_jax.sharding import make_mesh

    return make_mesh(mesh_sizes(mesh))


def share_of(processes: int | None, process: int | None) -> Share:
    """The share of this process, from ``--num-processes`` and ``--process-id`` or else from SLURM."""
    from pdrop_jax.train.processes import under_slurm

    if (processes is None) != (process is None):
        raise UserError("--num-processes and --process-id must be given together: give both or none")
    if processes is None or process is None:
        _, processes, process = under_slurm(os.environ) or ("", 1, 0)
    return Share(process, processes)


def read_images(images: tuple[str, ...]) -> list[Any]:
    """What ``--image`` names: paths, ``data:`` URLs as they are, and the bytes of http(s) URLs and of stdin, ``-``."""
    from pdrop_jax.inputs.download import download, is_http_url
    from pdrop_jax.inputs.encoded import is_data_url

    piped = None
    if "-" in images:
        piped = sys.stdin.buffer.read(IMAGE_BYTES + 1)
        if len(piped) > IMAGE_BYTES:
            raise UserError(f"--image -: stdin has more than {IMAGE_BYTES:,} bytes")

    def read(name: str) -> Any:
        if name == "-":
            return piped
        if is_http_url(name):
            return download(name, "--image")
        return name if is_data_url(name) else as_path(name)

    return list(map(read, images))


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Prints what is going on and how long it took, on a terminal only."""
    began = time.perf_counter()
    if sys.stderr.isatty():
        print(f"{what} …", file=sys.stderr, flush=True)
    yield
    if sys.stderr.isatty():
        print(f"{what}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
