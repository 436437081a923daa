"""Converted tiny models of each family."""

import pytest
import tiny_gemma
import tiny_qwen
import tiny_tiles

from pdrop_jax.convert.importer import convert


def converted(tiny, root):
    """kind -> (the folder of transformers, the converted one)."""
    found = {}
    for kind in tiny.KINDS:
        theirs = tiny.save(kind, root / kind)
        convert(theirs, root / f"{kind}-ours")
        found[kind] = theirs, root / f"{kind}-ours"
    return found


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return converted(tiny_qwen, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def tiles(tmp_path_factory):
    return converted(tiny_tiles, tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    """(the folder of transformers, the converted one)."""
    root = tmp_path_factory.mktemp("gemma")
    theirs = tiny_gemma.save(root / "theirs")
    convert(theirs, root / "ours")
    return theirs, root / "ours"


@pytest.fixture(scope="session")
def gemma_crops(tmp_path_factory):
    """As ``gemma``, converted, with pan-and-scan."""
    root = tmp_path_factory.mktemp("gemma-crops")
    convert(tiny_gemma.save(root / "theirs", **tiny_gemma.PAN_AND_SCAN), root / "ours")
    return root / "ours"
