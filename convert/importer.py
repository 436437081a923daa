"""PyTorch checkpoint -> pdrop-jax checkpoint, one array at a time."""

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from pdrop_jax import checkpoint
from pdrop_jax.checkpoint import storage
from pdrop_jax.checkpoint.storage import write_safetensors
from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hub import fetch_files, locate
from pdrop_jax.convert.names import Leaf, leaves, unrun_shapes
from pdrop_jax.convert.provenance import write_provenance
from pdrop_jax.convert.sources import Source, open_source
from pdrop_jax.convert.tensors import DTYPES, DType, Tensors
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.chat_template import template_named
from pdrop_jax.inputs.model_template import OWN, find_chat_template
from pdrop_jax.model.params import Params, init_array, param_specs
from pdrop_jax.model.standby_specs import copied_from
from pdrop_jax.paths import files_below
from pdrop_jax.schedule import DropSchedule


@dataclasses.dataclass(frozen=True)
class ImportSummary:
    """What a conversion wrote."""

    config: LlavaConfig
    dtype: str
    tensors: int  # of PyTorch
    bytes: int
    has_tokenizer: bool


def convert(
    source: str | os.PathLike,
    out: pathlib.Path,
    *,
    vision: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    dtype: DType | None = None,
    schedule: DropSchedule | None = None,
) -> ImportSummary:
    """``write`` of ``open_source``: checkpoint ``out`` from the PyTorch checkpoint ``source``."""
    return write(open_source(source, vision, schedule), out, tokenizer=tokenizer, dtype=dtype)


def write(
    source: Source,
    out: pathlib.Path,
    *,
    tokenizer: str | os.PathLike | None = None,
    dtype: DType | None = None,
    template: str | None = None,
    seed: int = 0,
) -> ImportSummary:
    """Writes checkpoint ``out``.

    Peak memory is the largest array, its largest PyTorch tensor and orbax's buffers.

    Args:
      tokenizer: folder or id of the tokenizer; None is the source's.
      dtype: of the arrays; None is ``default_dtype``.
      template: "own" or a name in ``chat_template.TEMPLATES``; None is the checkpoint's own chat template, or
        without one what LLaVA used with this kind of language model.
      seed: RNG seed of the new arrays of standby tokens.

    Raises:
      UserError: ``out`` exists, the template is unknown, or the tokenizer or the template is missing; nothing is
        written.
      OSError: the disk is full or not writable; nothing is left behind.
    """
    config, tensors = source.config, source.tensors
    if template not in (None, OWN):
        template_named(template)
    arrays = leaves(config, source.naming)
    dtype = dtype or default_dtype(source)
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    unrun = [tensors[name].shape for name in unrun_shapes(config, source.naming) if name in tensors]
    size = sum(math.prod(shape) for shape in [*(leaf.shape for leaf in arrays), *unrun]) * itemsize
    with checkpoint.new_folder(out, size) as new:
        _copy_companions(source, tokenizer, new)
        config = dataclasses.replace(config, template=_template(template, config.template, new))
        storage.write(new, itertools.chain(_stacks(arrays, tensors, dtype), _standby(source, dtype, seed)))
        _write_unrun(source, new / checkpoint.UNUSED, dtype)
        write_provenance(new, source.location, source.tower)
        config.save(new)  # last, see ``new_folder``
        return ImportSummary(
            config,
            dtype,
            tensors=len(tensors),
            bytes=sum(files_below(new).values()),
            has_tokenizer=any(any(new.glob(pattern)) for pattern in checkpoint.TOKENIZER),
        )


def default_dtype(source: Source) -> DType:
    """float32 if the source's embedding is, otherwise bfloat16."""
    embedding = next(leaf.names[0] for leaf in leaves(source.config, source.naming) if leaf.path == "embed.embedding")
    return "float32" if source.tensors[embedding].dtype == "float32" else "bfloat16"


def read(
    source: pathlib.Path, schedule: DropSchedule | None = None, dtype: DType = "float32"
) -> tuple[LlavaConfig, Params]:
    """The model of a PyTorch checkpoint, in memory only. Raises UserError as ``convert`` does."""
    opened = open_source(source, schedule=schedule)
    arrays = _stacks(leaves(opened.config, opened.naming), opened.tensors, dtype)
    return opened.config, unflatten_dict(dict(arrays), sep=".")


def _stacks(arrays: list[Leaf], tensors: Tensors, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    for leaf in tqdm(arrays, unit="array", disable=None):
        yield leaf.path, _stack(leaf, tensors, dtype)


def _stack(leaf: Leaf, tensors: Tensors, dtype: str) -> np.ndarray:
    result = np.empty(leaf.shape, DTYPES[dtype])
    for part, name in zip(result if leaf.stacked else [result], leaf.names, strict=True):
        part[...] = leaf.transform.to_ours(tensors[name].read(), leaf.part_shape)
    return result


def _standby(source: Source, dtype: DType, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of standby tokens, if the config has them: copies of the pretrained ones, or new."""
    pretrained = {leaf.path: leaf for leaf in leaves(source.config, source.naming)}
    for name in flatten_dict(param_specs(source.config), sep="."):
        if name.startswith("standby."):
            copied = copied_from(name)
            if copied is None:
                yield name, np.asarray(init_array(source.config, name, seed, DTYPES[dtype]))
            else:
                yield name, _stack(pretrained[copied], source.tensors, dtype)


def _write_unrun(source: Source, path: pathlib.Path, dtype: str) -> None:
    names = [name for name in unrun_shapes(source.config, source.naming) if name in source.tensors]
    prefix = source.naming.vision
    write_safetensors(
        path, {name.removeprefix(prefix): source.tensors[name].read().astype(DTYPES[dtype]) for name in names}
    )


def _template(asked: str | None, of_llava: str, new: pathlib.Path) -> str:
    own = find_chat_template(new) is not None
    if asked == OWN and not own:
        raise UserError("there is no chat template among the files of the tokenizer: choose another --template")
    return asked or (OWN if own else of_llava)


def _copy_companions(source: Source, tokenizer: str | os.PathLike | None, new: pathlib.Path) -> None:
    folder = source.folder
    if tokenizer is not None:
        location = locate(tokenizer)
        folder = fetch_files(location, checkpoint.TOKENIZER)
        if not any(any(folder.glob(pattern)) for pattern in checkpoint.TOKENIZER):
            raise UserError(f"{location.name} contains no tokenizer files")
    checkpoint.copy_files(folder, new, checkpoint.TOKENIZER)
    for location in filter(None, (source.location, source.tower)):
        checkpoint.copy_files(location.folder, new, checkpoint.PROCESSOR)
