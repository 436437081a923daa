"""``pdrop train``: train a model from a recipe."""

import dataclasses
import os
from typing import Annotated

import tyro

from pdrop_jax.cli.options import Flag, mesh_sizes, unset


def run(
    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")],
    settings: Annotated[tuple[str, ...], unset("KEY=VALUE [KEY=VALUE …]", name="set")] = (),
    mesh: Annotated[tuple[str, ...], unset("AXIS=N [AXIS=N …]")] = (),
    allow_changes: Flag = False,
    profile: Annotated[str | None, unset("START:STOP")] = None,
    coordinator: Annotated[str | None, unset("HOST:PORT")] = None,
    num_processes: Annotated[int | None, unset("N")] = None,
    process_id: Annotated[int | None, unset("N")] = None,
) -> None:
    """Train a model. To resume a run that was stopped or killed, run the same command again.

    Args:
      recipe: TOML or JSON file, or a preset:
        llava-1.5-pretrain, llava-1.5-finetune, llava-next-pretrain, llava-next-finetune, llava-uhd-v4-stage1 to
        -stage4, standby-stage1, standby-stage2.
      settings: Override settings of the recipe, e.g. run.steps=100.
      mesh: Devices along the mesh axes data, fsdp and tensor (default: the recipe's mesh, or all devices along fsdp).
      allow_changes: Resume even if the recipe, the data or the starting model has changed since the run was started.
      profile: Write a profile of the steps START to STOP, counted from 1, to the folder "profile" in the run folder.
      coordinator: HOST:PORT of process 0 for multi-process training. Not needed under SLURM and on Cloud TPUs.
      num_processes: Total number of processes. Not needed under SLURM and on Cloud TPUs.
      process_id: Index of this process, starting at 0. Not needed under SLURM and on Cloud TPUs.
    """
    from pdrop_jax.train.processes import check_options, together
    from pdrop_jax.train.recipe import load_recipe
    from pdrop_jax.train.tracing import parse_range

    check_options(coordinator, num_processes, process_id)
    steps = None if profile is None else parse_range(profile)
    sizes = [f"mesh.{axis}={size}" for axis, size in mesh_sizes(mesh).items()]
    loaded = load_recipe(recipe, [*settings, *sizes])
    with together(coordinator, num_processes, process_id):
        from pdrop_jax.convert.cache import model_folder
        from pdrop_jax.train.loop import train

        start = os.fspath(model_folder(loaded.model.start))
        loaded = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, start=start))
        train(loaded, allow_changes=allow_changes, profile=steps)
