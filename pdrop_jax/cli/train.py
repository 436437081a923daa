"""``pdrop train``: train a model from a recipe."""

from typing import Annotated

import tyro

from pdrop_jax.cli.options import Mesh, mesh_sizes


def run(
    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")],
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE [KEY=VALUE …]")] = (),
    mesh: Mesh = (),
    allow_changes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Train a model. To resume a run that was stopped or killed, run the same command again.

    Args:
      recipe: TOML or JSON file, or a preset:
        llava-1.5-pretrain, llava-1.5-finetune, llava-next-pretrain, llava-next-finetune.
      settings: override settings of the recipe, e.g. run.steps=100.
      mesh: devices along the mesh axes data, fsdp and tensor (default: the recipe's mesh, or all devices along fsdp).
      allow_changes: resume even if the recipe, the data or the starting model has changed since the run was started.
      coordinator: HOST:PORT of process 0 for multi-process training. Not needed under SLURM and on Cloud TPUs.
      num_processes: total number of processes. Not needed under SLURM and on Cloud TPUs.
      process_id: index of this process, starting at 0. Not needed under SLURM and on Cloud TPUs.
    """
    from pdrop_jax.train.processes import together
    from pdrop_jax.train.recipe import load_recipe

    sizes = [f"mesh.{axis}={size}" for axis, size in mesh_sizes(mesh).items()]
    loaded = load_recipe(recipe, [*settings, *sizes])
    with together(coordinator, num_processes, process_id):
        from pdrop_jax.train.loop import train

        train(loaded, allow_changes=allow_changes)
