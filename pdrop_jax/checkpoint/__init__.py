"""Checkpoints on disk; ``store`` describes the folder, ``storage`` the arrays in it."""

from pdrop_jax.checkpoint.folders import (
    COMPANIONS,
    PROCESSOR,
    TOKENIZER,
    copy_files,
    files_to_copy,
    locally,
    new_folder,
)
from pdrop_jax.checkpoint.store import (
    SOURCE,
    TRAINING,
    UNUSED,
    abstract_arrays,
    check_shapes,
    fingerprint,
    load,
    restore,
    save,
    training,
)

__all__ = [
    "COMPANIONS",
    "PROCESSOR",
    "SOURCE",
    "TOKENIZER",
    "TRAINING",
    "UNUSED",
    "abstract_arrays",
    "check_shapes",
    "copy_files",
    "files_to_copy",
    "fingerprint",
    "load",
    "locally",
    "new_folder",
    "restore",
    "save",
    "training",
]
