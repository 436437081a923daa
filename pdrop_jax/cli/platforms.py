"""Which backends JAX should look for, decided before it is imported."""

import glob
import importlib.metadata
import importlib.util
import os
import pathlib
from collections.abc import MutableMapping

GOOGLE = "0x1ae0"  # PCI vendor of TPUs


def skip_missing_tpu(environ: MutableMapping[str, str] = os.environ) -> None:
    """Keeps JAX from starting an installed libtpu on a machine without a TPU.

    libtpu would look for its chips, query the metadata server of a cloud, and print errors about both. Nothing is
    changed where there may be a TPU, where the user has set JAX_PLATFORMS, and where a plugin for another accelerator
    is installed, which JAX must be free to choose.
    """
    if "JAX_PLATFORMS" not in environ and _has_libtpu() and not _may_have_tpu() and not _has_plugin():
        environ["JAX_PLATFORMS"] = "cpu"


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _may_have_tpu() -> bool:
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == GOOGLE for vendor in vendors)


def _has_plugin() -> bool:
    return (
        bool(importlib.metadata.entry_points(group="jax_plugins"))
        or importlib.util.find_spec("jax_plugins") is not None
    )
