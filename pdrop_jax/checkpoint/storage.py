"""Read and write the arrays of a checkpoint folder, in one of two formats.

::

    params/0, 1, …        written by orbax, a group of arrays at a time, for models of any size
    arrays.json           group, shape and dtype of each array; orbax takes dozens of requests to a bucket to tell
    sizes.json            size in bytes of each file in params/, to report truncated files before orbax reads them
    checksums.json        checksum of each array

    params.safetensors    replaces them all: a single file for small models, with the checksums in its metadata

Both formats store the same arrays under the same names, such as ``stages.0.mlp.up.kernel``. Empty arrays, which occur
in the empty stage before a drop at layer 0, are not stored. Checkpoints of the first release have all arrays in params/
itself and no checksums; reading one prints a note on stderr that it is not verified.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import pathlib
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp
from pydantic import Field
from safetensors import SafetensorError

from pdrop_jax.checkpoint.checksums import Checksums, Stored, checksums, verify
from pdrop_jax.checkpoint.failed_saves import end_failed_save
from pdrop_jax.checkpoint.noise import silence_library_noise
from pdrop_jax.checkpoint.remote import orbax_context, orbax_path
from pdrop_jax.checkpoint.tensor_files import DTYPES, open_tensors, save_tensors
from pdrop_jax.errors import UserError
from pdrop_jax.io import parse_json, read_json
from pdrop_jax.paths import files_below, in_bucket, reason
from pdrop_jax.schema import validated

PARAMS = "params"
SIZES = "sizes.json"
ARRAYS = "arrays.json"
CHECKSUMS = "checksums.json"
SINGLE_FILE = "params.safetensors"
GROUP_BYTES = 256 * 2**20  # small arrays are written and read together, since each call takes some milliseconds
REMOTE_GROUP_BYTES = 2**30  # of a bucket, where each call makes about a hundred requests one after the other
CHUNK_BYTES = 16 * 2**20  # orbax writes chunk by chunk; otherwise its buffers would be as large as the array


@dataclasses.dataclass(frozen=True)
class Place:
    """What ``arrays.json`` says about an array."""

    group: Annotated[int, Field(ge=0, lt=2**20)]
    shape: tuple[Annotated[int, Field(ge=0, lt=2**40)], ...]
    dtype: Literal["float32", "bfloat16", "float16"]


Arrays = dict[str, jax.Array]
Targets = Mapping[str, jax.ShapeDtypeStruct]


def is_single_file(folder: pathlib.Path) -> bool:
    """Whether the arrays in ``folder`` are stored as ``params.safetensors``."""
    return (folder / SINGLE_FILE).exists()


def stored(folder: pathlib.Path) -> dict[str, Any]:
    """Shape and dtype of each array in ``folder``, without reading the arrays.

    Raises:
      UserError: the folder has no arrays, or they are damaged.
    """
    found = _stored_in_file(folder) if is_single_file(folder) else _stored_by_orbax(folder)
    expected = read_checksums(folder)
    if expected is not None and expected.keys() != found.keys():
        name = min(expected.keys() ^ found.keys())
        raise UserError(
            f"{folder} is damaged: array {name} {'is missing' if name in expected else 'has no checksum'}; "
            "copy or convert it again"
        )
    return found


def read(folder: pathlib.Path, targets: Targets, dtype: Any = None, *, check: bool = True) -> Arrays:
    """Reads the arrays named by ``targets`` with the shardings given there.

    Arrays are read in groups of ``GROUP_BYTES``, because orbax needs twice the memory of what it reads in one call.

    Args:
      targets: shapes, stored dtypes (see ``stored``) and shardings by array name.
      dtype: dtype to cast the arrays to after verification; None keeps the stored dtype.
      check: verify the checksums, if the checkpoint has them.

    Raises:
      UserError: the checkpoint is damaged.
    """
    wanted = {name: x for name, x in targets.items() if 0 not in x.shape}
    expected = read_checksums(folder) if check else None
    if check and expected is None:
        _note_unverified(folder)
    read_group = _read_file if is_single_file(folder) else _read_by_orbax
    arrays: Arrays = {}
    for names in _groups(wanted):
        group = read_group(folder, {name: wanted[name] for name in names})
        if expected is not None:
            verify(group, expected, str(folder))
        for name in names:
            x = group.pop(name)
            arrays[name] = x if dtype in (None, x.dtype) else jax.block_until_ready(x.astype(dtype))
            del x
        trim_memory()
    empty = {
        name: jnp.zeros(x.shape, dtype or x.dtype, device=x.sharding) for name, x in targets.items() if 0 in x.shape
    }
    return {name: empty[name] if name in empty else arrays[name] for name in targets}


def read_checksums(folder: pathlib.Path) -> Checksums | None:
    """Checksum of every array in ``folder``; None if the checkpoint was written without checksums.

    Raises:
      UserError: the checksums are damaged.
    """
    if is_single_file(folder):
        return _checksums_of_file(folder / SINGLE_FILE)
    path = folder / CHECKSUMS
    return validated(Stored, read_json(path), str(path)) if path.exists() else None


def write(folder: pathlib.Path, arrays: Iterable[tuple[str, Any]]) -> None:
    """Writes (name, array) pairs to ``params/`` as the iterable yields them. All processes must call it.

    Besides arrays that the caller keeps, this needs memory for the largest array and twice ``GROUP_BYTES``.

    Raises:
      OSError: the disk is full or not writable.
    """
    context = orbax_context(folder)
    context.memory.deepcopy_host_arrays = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    # Compression saves a fifth of the size of bfloat16 weights, but halves the write speed.
    context.array.saving.use_compression = False
    limit = REMOTE_GROUP_BYTES if in_bucket(folder) else GROUP_BYTES
    group: dict[str, Any] = {}
    found: Checksums = {}
    places: dict[str, Place] = {}

    def save_group() -> None:
        number = len({place.group for place in places.values()})
        places.update({name: Place(number, tuple(x.shape), x.dtype.name) for name, x in group.items()})
        found.update(checksums(group))
        ocp.save(orbax_path(folder / PARAMS / str(number)), unflatten_dict(group, sep="."))
        group.clear()
        trim_memory()

    with context, _writing(folder):
        for name, x in arrays:
            if 0 not in x.shape:
                group[name] = x
            del x  # otherwise it stays alive while the next one is created
            if sum(x.nbytes for x in group.values()) >= limit:
                save_group()
        if group:
            save_group()
    if jax.process_index() == 0:
        (folder / ARRAYS).write_text(json.dumps({name: dataclasses.asdict(x) for name, x in places.items()}) + "\n")
        (folder / CHECKSUMS).write_text(json.dumps(found, indent=2) + "\n")
        (folder / SIZES).write_text(json.dumps(_sizes(folder), indent=2) + "\n")


def write_single_file(folder: pathlib.Path, arrays: Iterable[tuple[str, Any]]) -> None:
    """Writes (name, array) pairs to ``params.safetensors``, with all arrays in memory at once.

    Raises:
      OSError: the disk is full or not writable.
    """
    write_safetensors(folder / SINGLE_FILE, {name: np.asarray(x) for name, x in arrays if 0 not in x.shape})


def write_safetensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes ``arrays`` with their checksums. Raises OSError as ``write`` does."""
    with _writing(path.parent):
        metadata = {"format": "pt", CHECKSUMS: json.dumps(checksums(arrays))}
        save_tensors(path, arrays, metadata)


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a file written by ``write_safetensors``.

    Raises:
      UserError: the file is damaged.
    """
    expected = _checksums_of_file(path)
    with _opened(path) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if expected is not None:
        if expected.keys() != arrays.keys():
            raise UserError(f"{path} is damaged: array {min(expected.keys() ^ arrays.keys())} is missing")
        verify(arrays, expected, str(path))
    return arrays


def trim_memory() -> None:
    """Makes glibc return memory freed by orbax's threads to the system, about the size of the last array."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to do
        ctypes.CDLL(None).malloc_trim(0)


def _stored_by_orbax(folder: pathlib.Path) -> dict[str, Any]:
    if not (folder / PARAMS).exists() and not (folder / SIZES).exists():
        raise UserError(f"{folder} is not a checkpoint: it holds no arrays, neither {PARAMS}/ nor {SINGLE_FILE}")
    expected, sizes = validated(dict[str, int], read_json(folder / SIZES), str(folder / SIZES)), _sizes(folder)
    damaged = [name for name, size in expected.items() if sizes.get(name) != size]
    if damaged:
        raise UserError(
            f"{folder} is damaged: {len(damaged)} of {len(expected)} files are missing or have a different size, "
            f"the first is {damaged[0]}; copy or convert it again"
        )
    if (places := _places(folder)) is not None:
        return {name: jax.ShapeDtypeStruct(place.shape, jnp.dtype(place.dtype)) for name, place in places.items()}
    silence_library_noise()
    with _reading(folder), orbax_context(folder):
        tree = ocp.metadata(orbax_path(folder / PARAMS)).metadata
        if tree is None:
            raise ValueError("its array metadata cannot be read")
    return flatten_dict(tree, sep=".")


def _read_by_orbax(folder: pathlib.Path, targets: Targets) -> Arrays:
    silence_library_noise()
    context = orbax_context(folder)
    context.pytree.loading.partial_load = True
    places = _places(folder)
    groups: dict[pathlib.Path, dict[str, Any]] = {}
    for name, x in targets.items():
        group = folder / PARAMS if places is None else folder / PARAMS / str(places[name].group)
        groups.setdefault(group, {})[name] = x
    found: Arrays = {}
    with _reading(folder), context:
        for group, wanted in groups.items():
            found |= flatten_dict(ocp.load(orbax_path(group), unflatten_dict(wanted, sep=".")), sep=".")
    return found


def _places(folder: pathlib.Path) -> dict[str, Place] | None:
    """The index of the arrays; None if all of them are in params/ itself."""
    path = folder / ARRAYS
    return validated(dict[str, Place], read_json(path), str(path)) if path.exists() else None


def _groups(wanted: Targets) -> Iterator[list[str]]:
    """Groups array names into runs of about ``GROUP_BYTES``."""
    group: list[str] = []
    size = 0
    for name, x in wanted.items():
        group.append(name)
        size += math.prod(x.shape) * x.dtype.itemsize
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    return {f"{PARAMS}/{name}": size for name, size in files_below(folder / PARAMS).items()}


def _stored_in_file(folder: pathlib.Path) -> dict[str, Any]:
    with _reading(folder), _opened(folder / SINGLE_FILE) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: jax.ShapeDtypeStruct(tuple(x.get_shape()), DTYPES[x.get_dtype()]) for name, x in slices.items()}


def _read_file(folder: pathlib.Path, targets: Targets) -> Arrays:
    with _reading(folder), _opened(folder / SINGLE_FILE) as file:
        return {name: jax.device_put(file.get_tensor(name), x.sharding) for name, x in targets.items()}


@functools.cache  # once per folder
def _note_unverified(folder: pathlib.Path) -> None:
    if jax.process_index() == 0:
        print(
            f"note: {folder} was written without checksums, so damage to its arrays cannot be detected; "
            f"pdrop export {folder} OUT --format pdrop writes a copy with checksums",
            file=sys.stderr,
        )


def _checksums_of_file(path: pathlib.Path) -> Checksums | None:
    with _opened(path) as file:
        text = (file.metadata() or {}).get(CHECKSUMS)
    where = f"the metadata of {path}"
    return None if text is None else validated(Stored, parse_json(text, where), where)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    with _reading(path), open_tensors(path) as file:
        yield file


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes orbax raise
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"the arrays in {path} cannot be read ({reason}): convert the checkpoint again or restore a copy"
        ) from None


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    silence_library_noise()
    others = set(threading.enumerate())
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        end_failed_save(others)
        if in_bucket(folder):
            raise UserError(f"{folder} cannot be written: {reason(folder, error)}") from None
        if not isinstance(error, ValueError | SafetensorError):
            raise
        # how orbax and safetensors report errors of the operating system
        raise OSError(f"{folder} cannot be written: {str(error).splitlines()[0].rpartition(': ')[2]}") from None
