"""Models in buckets, as typed."""

import jax
import numpy as np

from pdrop_jax import checkpoint
from pdrop_jax.generation.pretrained import DEMO
from pdrop_jax.paths import files_below
from pdrop_jax.schedule import DropSchedule


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_out_and_back(pdrop, bucket):
    """Exported to a bucket, converted from there to the same bucket, and asked."""
    assert pdrop("export", DEMO, bucket / "hf", "--format", "hf").stdout.startswith(f"{bucket}/hf: ")
    assert pdrop("convert", bucket / "hf", bucket / "model").stdout.startswith(f"{bucket}/model: ")
    dense = DropSchedule.none()
    equal(
        checkpoint.load(bucket / "model", schedule=dense)[1]["stages"],
        checkpoint.load(DEMO, schedule=dense)[1]["stages"],
    )
    ask = ("generate", "--prompt", "What is this?", "--max-new-tokens", 4, "--layers", "none")
    assert pdrop(*ask, "--model", bucket / "model").stdout == pdrop(*ask).stdout
    assert not [name for name in files_below(bucket) if "pdrop" in name]
