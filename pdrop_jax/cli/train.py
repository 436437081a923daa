"""``pdrop train``: train a model as a recipe says."""

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
    """Train a model; the same command resumes a run that was stopped or killed.

    Args:
      recipe: a TOML or JSON file, or a preset: llava-1.5-pretrain, llava-1.5-finetune, llava-next-pretrain,
        llava-next-finetune.
      settings: of the recipe, to be changed, as run.steps=100.
      mesh: devices along the axes data, fsdp and tensor; without it the recipe's, by default all along fsdp.
      allow_changes: go on although the recipe, the data or the starting model are not what the run began with.
      coordinator: HOST:PORT of process 0, to train with several processes; SLURM and Cloud TPUs need none of the three.
      num_processes: how many there are.
      process_id: which one this is, from 0.
    """
    from pdrop_jax.train.processes import together
    from pdrop_jax.train.recipe import load_recipe

    sizes = [f"mesh.{axis}={size}" for axis, size in mesh_sizes(mesh).items()]
    loaded = load_recipe(recipe, [*settings, *sizes])
    with together(coordinator, num_processes, process_id):
        from pdrop_jax.train.loop import train

        train(loaded, allow_changes=allow_changes)
