"""Checkpoints on disk: a folder with config.json, the arrays, and the files of the tokenizer.

::

    config.json             LlavaConfig with its drop schedule
    params/, sizes.json     the parameter tree; or params.safetensors, see ``storage``
    unused.safetensors      unused tensors of the PyTorch model, kept for a complete export
    source.json             what the model was converted from, see ``convert.provenance``
    tokenizer.json, …       files for the processor, see ``folders.COMPANIONS``
    training.json           of a trained model: the run and the step, see ``train.checkpoints.Trained``
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from pdrop_jax.checkpoint import storage
from pdrop_jax.checkpoint.folders import COMPANIONS, copy_files, files_to_copy, new_folder
from pdrop_jax.config import CacheDtype, LlavaConfig, Quantization
from pdrop_jax.errors import UserError
from pdrop_jax.io import read_bytes, read_json
from pdrop_jax.model.lora import has_lora
from pdrop_jax.model.params import Params, abstract_params
from pdrop_jax.model.placement import shardings
from pdrop_jax.model.quantization import check_quantization, is_quantized, quantize_decoder
from pdrop_jax.model.scores import find_score
from pdrop_jax.model.stacking import restage
from pdrop_jax.paths import as_path
from pdrop_jax.schedule import DropSchedule

UNUSED = "unused.safetensors"
SOURCE = "source.json"
TRAINING = "training.json"
MOST_NAMES = 20  # listed in an error message


def save(
    folder: str | os.PathLike,
    config: LlavaConfig,
    params: Params,
    companions: str | os.PathLike | None = None,
    *,
    single_file: bool = False,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint. ``folder`` appears when it is complete. All processes call it.

    Args:
      params: stacked by the stages of ``config.schedule``, as ``abstract_params`` describes.
      companions: another checkpoint, whose tokenizer files and unused tensors are copied.
      single_file: store the arrays in one file, for a small model that is shipped.
      training: contents of training.json.

    Raises:
      UserError: ``folder`` exists, ``params`` does not fit ``config``, carries LoRA adapters or is quantized, or a file
        of ``companions`` cannot be copied, see ``copy_files``.
      OSError: the disk is full or may not be written; nothing is left behind.
    """
    if has_lora(params):
        raise UserError("the parameters carry LoRA adapters, which a checkpoint cannot hold: call merge_lora first")
    along = (*COMPANIONS, UNUSED, SOURCE)
    if companions is not None:
        files_to_copy(as_path(companions), along)  # before anything is written
    arrays = flatten_dict(params, sep=".")
    if any(map(is_quantized, arrays.values())):
        raise UserError("the parameters are quantized, which a checkpoint cannot hold: load them without quantize")
    check_shapes(_shapes(config), _nonempty_shapes(arrays), "the parameters do not fit the config")
    with new_folder(folder, sum(x.nbytes for x in arrays.values())) as new:
        (storage.write_single_file if single_file else storage.write)(new, arrays.items())
        if jax.process_index():
            return
        if training is not None:
            (new / TRAINING).write_text(json.dumps(training, indent=2) + "\n")
        if companions is not None:
            copy_files(as_path(companions), new, along)
        config.save(new)  # last, see ``new_folder``


def load(
    folder: str | os.PathLike,
    *,
    schedule: DropSchedule | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    quantize: Quantization | None = None,
    verify: bool = True,
    quantize_cache: CacheDtype | None = None,
) -> tuple[LlavaConfig, Params]:
    """Reads a checkpoint onto the default device or a mesh.

    Args:
      schedule: moves the stage boundaries to these; None keeps the checkpoint's own.
      dtype: of the arrays; None keeps each array's own.
      mesh: every device reads its part of an array, see ``sharding``.
      quantize: of the decoder's linear layers, see ``model.quantization``.
      verify: compare every array with the checksum that was taken when it was written.
      quantize_cache: sets ``config.text.cache_dtype``.

    Returns:
      The config, with ``schedule`` if one is given, and the parameters stacked by its stages.

    Raises:
      UserError: ``folder`` is not a checkpoint or a damaged one, its arrays do not fit its config, the schedule does
        not fit the decoder or names a score that is unknown or not for it, or there is no such quantization.
    """
    check_quantization(quantize, quantize_cache)
    folder = as_path(folder)
    config = LlavaConfig.load(folder)
    result = config if schedule is None else dataclasses.replace(config, schedule=schedule)
    result = result.with_cache_dtype(quantize_cache)
    find_score(result)
    targets = abstract_arrays(folder, config, mesh=mesh)
    # Both copy arrays. One decoder array at a time keeps the model from being in memory twice.
    whole = result.schedule.layers == config.schedule.layers and not quantize
    parts = [list(targets)] if whole else _by_array(targets)
    arrays: dict[str, jax.Array] = {}
    for names in parts:
        part = restore(folder, {name: targets[name] for name in names}, dtype, verify=verify)
        if "stages" in part:
            part = restage(part, config, result.schedule)
        if quantize:
            part = quantize_decoder(result, part, quantize)
        arrays |= flatten_dict(part, sep=".")
    return result, unflatten_dict(arrays, sep=".")


def training(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The training.json of a checkpoint; None if there is none.

    Raises:
      UserError: the file is damaged.
    """
    path = as_path(folder) / TRAINING
    return read_json(path) if path.exists() else None


def fingerprint(folder: str | os.PathLike) -> str:
    """A hash of a checkpoint's config and arrays. Orbax names its files at random, so names and sizes identify it.

    Raises:
      UserError: ``folder`` is not a checkpoint.
    """
    folder = as_path(folder)
    digest = hashlib.blake2b(digest_size=16)
    arrays = storage.SINGLE_FILE if storage.is_single_file(folder) else storage.SIZES
    for name in ("config.json", arrays):
        digest.update(read_bytes(folder / name))
    return digest.hexdigest()


def abstract_arrays(
    folder: pathlib.Path,
    config: LlavaConfig,
    device: jax.Device | None = None,
    mesh: Mesh | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The target of ``restore`` for every array of ``config``: shape, stored dtype and sharding by path.

    Args:
      device: None is the default one.
      mesh: instead of a device.

    Raises:
      UserError: the arrays in ``folder`` cannot be read or are not those of ``config``.
    """
    stored = storage.stored(folder)
    check_shapes(_shapes(config), _nonempty_shapes(stored), f"the arrays in {folder} do not fit its config.json")
    params = abstract_params(config)
    one = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
    where = jax.tree.map(lambda _: one, params) if mesh is None else shardings(config, params, mesh)

    def target(name: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        own = stored.get(name, stored["embed.embedding"]).dtype
        return jax.ShapeDtypeStruct(shape, own, sharding=sharding)

    flat = flatten_dict(where, sep=".")
    return {name: target(name, x.shape, flat[name]) for name, x in flatten_dict(params, sep=".").items()}


def restore(
    folder: pathlib.Path, targets: Mapping[str, jax.ShapeDtypeStruct], dtype: Any = None, *, verify: bool = True
) -> Params:
    """The arrays of ``targets``, any selection of a checkpoint's, as a nested dict.

    Args:
      dtype: None is each array's own.
      verify: see ``load``.

    Raises:
      UserError: the checkpoint is damaged.
    """
    return unflatten_dict(storage.read(folder, targets, dtype, check=verify), sep=".")


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises one UserError that lists every array that is missing, unexpected or of another shape."""
    missing = [f"missing: {name} {list(expected[name])}" for name in expected if name not in found]
    unexpected = [f"unexpected: {name} {list(found[name])}" for name in found if name not in expected]
    wrong = [
        f"wrong shape: {name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    lines = [*missing, *wrong, *unexpected]
    if lines:
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape"
        more = [f"… and {len(lines) - MOST_NAMES} more"] if len(lines) > MOST_NAMES else []
        raise UserError(f"{what}: {counts}", *lines[:MOST_NAMES], *more)


def _shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    return _nonempty_shapes(flatten_dict(abstract_params(config), sep="."))


def _nonempty_shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in arrays.items() if 0 not in x.shape}


def _by_array(names: Iterable[str]) -> list[list[str]]:
    """Groups names: each decoder array with all its stages, everything else together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        array = name.split(".", 2)[2] if name.startswith("stages.") else ""
        groups.setdefault(array, []).append(name)
    return list(groups.values())
