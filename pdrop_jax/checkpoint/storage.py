"""Read and write the arrays of a checkpoint folder, in one of two formats.

::

    params/               written by orbax, array by array, for models of any size
    sizes.json            size in bytes of each file in params/, to report truncated files before orbax reads them
    checksums.json        checksum of each array

    params.safetensors    replaces all three: a single file for small models, with the checksums in its metadata

Both formats store the same arrays under the same names, such as ``stages.0.mlp.up.kernel``. Empty arrays, which occur
in the empty stage before a drop at layer 0, are not stored. Checkpoints of the first release have no checksums; reading
one prints a note on stderr that it is not verified.
"""

import contextlib
import ctypes
import errno
import functools
import json
import logging
import math
import pathlib
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pdrop_jax.checkpoint.checksums import Checksums, Stored, checksums, verify
from pdrop_jax.errors import UserError
from pdrop_jax.io import check_file, parse_json, read_json
from pdrop_jax.schema import validated

PARAMS = "params"
SIZES = "sizes.json"
CHECKSUMS = "checksums.json"
SINGLE_FILE = "params.safetensors"
GROUP_BYTES = 256 * 2**20  # small arrays are written and read together, since each call takes some milliseconds
CHUNK_BYTES = 16 * 2**20  # orbax writes chunk by chunk; otherwise its buffers would be as large as the array
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}  # names of safetensors

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
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    # Compression saves a fifth of the size of bfloat16 weights, but halves the write speed.
    context.array.saving.use_compression = False
    group: dict[str, Any] = {}
    found: Checksums = {}
    with context, _writing(folder):
        for name, x in arrays:
            if 0 not in x.shape:
                group[name] = x
            del x  # otherwise it stays alive while the next one is created
            if sum(x.nbytes for x in group.values()) >= GROUP_BYTES:
                found |= _save_group(folder, group)
        found |= _save_group(folder, group)
        ocp.partial.finalize(folder.absolute() / PARAMS)
    if jax.process_index() == 0:
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
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path, metadata)


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
    silence_library_noise()
    with _reading(folder):
        tree = ocp.metadata(folder.absolute() / PARAMS).metadata
        if tree is None:
            raise ValueError("its array metadata cannot be read")
    return flatten_dict(tree, sep=".")


def _read_by_orbax(folder: pathlib.Path, targets: Targets) -> Arrays:
    silence_library_noise()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with _reading(folder), context:
        return flatten_dict(ocp.load(folder.absolute() / PARAMS, unflatten_dict(targets, sep=".")), sep=".")


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
    files = sorted(path for path in (folder / PARAMS).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _save_group(folder: pathlib.Path, group: dict[str, Any]) -> Checksums:
    found = checksums(group)
    if group:
        ocp.partial.save(folder.absolute() / PARAMS, unflatten_dict(group, sep="."))
        group.clear()
        trim_memory()
    return found


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
    check_file(path)
    with _reading(path), safe_open(path, "np") as file:
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
    try:
        yield
    except UserError:
        raise
    except (ValueError, SafetensorError) as error:  # how orbax and safetensors report operating system errors
        raise OSError(f"{folder} cannot be written: {str(error).splitlines()[0].rpartition(': ')[2]}") from None


@functools.cache  # once per process: some of these messages only arrive while the interpreter shuts down
def silence_library_noise() -> None:
    """Hides what libraries print about a failed read or write besides the exception, which we report in one line.

    A filter on the loggers alone was tried and is not enough: at the first failure orbax closes its event loop while
    other reads and writes are pending, and each of these fails later in a TensorStore thread. TensorStore passes such
    failures to PyErr_WriteUnraisable or PyErr_Print, so they reach ``sys.unraisablehook`` or ``sys.excepthook`` and
    never a logger. The hooks below pass on everything else unchanged.
    """
    for name in ("absl", "asyncio"):  # orbax logs through absl; asyncio logs its tasks that nobody awaited
        logging.getLogger(name).addFilter(_is_not_from_orbax)
    sys.unraisablehook = functools.partial(_skip_orbax, sys.unraisablehook)
    sys.excepthook = functools.partial(_skip_closed_loop, sys.excepthook)
    threading.excepthook = functools.partial(_skip_full_disk, threading.excepthook)
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")  # jax continues without it


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in f"{record.pathname} {record.getMessage()}"


def _is_closed_loop(error: BaseException | None) -> bool:
    return type(error) is RuntimeError and str(error) == "Event loop is closed"


def _skip_orbax(report: Any, found: Any) -> None:
    """``sys.unraisablehook`` without orbax's closed event loop and the coroutines that it abandoned."""
    code = getattr(found.object, "cr_code", None)
    if not (_is_closed_loop(found.exc_value) or (code and "orbax" in code.co_filename)):
        report(found)


def _skip_closed_loop(
    report: Any, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not _is_closed_loop(error):
        report(kind, error, traceback)


def _skip_full_disk(report: Any, found: threading.ExceptHookArgs) -> None:
    """``threading.excepthook`` for TensorBoard's writer thread: its next call raises the same error in our thread."""
    if not (isinstance(found.exc_value, OSError) and found.exc_value.errno in FULL_DISK):
        report(found)
