"""Converted tiny models of each family."""

import pytest
import tiny_qwen

from pdrop_jax.convert.importer import convert


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """kind -> (the folder of transformers, the converted one)."""
    root = tmp_path_factory.mktemp("qwen")
    found = {}
    for kind in tiny_qwen.KINDS:
        theirs = tiny_qwen.save(kind, root / kind)
        convert(theirs, root / f"{kind}-ours")
        found[kind] = theirs, root / f"{kind}-ours"
    return found
