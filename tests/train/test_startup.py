"""What is said before a run starts."""

import jax
import pytest

from pdrop_jax.sharding import AXES
from pdrop_jax.train.recipe import RunRecipe
from pdrop_jax.train.startup import few_rows


@pytest.mark.parametrize(
    ("mesh", "rows", "parts", "warned"),
    [
        ((1, 16, 1), 128, 8, True),
        ((2, 8, 1), 128, 8, True),
        ((1, 16, 1), 128, 4, False),  # two rows a device
        ((1, 16, 1), 16, 1, False),  # one row, but there is nothing to lower
        ((16, 1, 1), 128, 8, False),  # nothing is gathered
    ],
)
def test_microbatches_of_one_row_a_device_are_warned_of(mesh, rows, parts, warned):
    run = RunRecipe(folder="run", batch_size=rows, grad_accum_steps=parts)
    said = few_rows(run, jax.sharding.AbstractMesh(mesh, AXES))
    assert bool(said) == warned
    if warned:
        assert said.startswith("run.grad_accum_steps is 8, which leaves a device 1 row at a time")
