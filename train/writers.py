"""Where the numbers of a run go besides its log file: TensorBoard and Weights & Biases."""

import importlib.util
import pathlib
import secrets
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from pdrop_jax.errors import UserError, printable
from pdrop_jax.io import read_json, write_file

WANDB = "wandb"  # folder of W&B's files in the run folder
WANDB_RUN = "run.json"  # in it, the id that a resumed run goes on with


class Writer(Protocol):
    """A place that shows scalars by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds named scalars of step ``step``."""

    def close(self) -> None:
        """Writes out what is buffered."""


def check_writers(wandb: str | None) -> None:
    """Raises UserError if Weights & Biases is wanted but not installed."""
    if wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb is {wandb!r}, but the package wandb is not installed: pip install 'pdrop-jax[wandb]'"
        )


def open_writers(folder: pathlib.Path, wandb: str | None, config: Mapping[str, Any]) -> list[Writer]:
    """TensorBoard if it is installed, and Weights & Biases if it is wanted.

    Args:
      folder: run folder.
      wandb: W&B project, "project" or "entity/project".
      config: the recipe, shown as the configuration of the W&B run.

    Raises:
      UserError: W&B cannot start, for example because nobody is logged in.
    """
    writers: list[Writer] = []
    if importlib.util.find_spec("tensorboard") is not None:
        writers.append(TensorBoard(folder / "tensorboard"))
    if wandb is not None:
        writers.append(WeightsAndBiases(folder / WANDB, wandb, config))
    return writers


class TensorBoard:
    """Event files in ``folder``."""

    def __init__(self, folder: pathlib.Path) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, np.float32(value), step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for a run folder, however often the training is resumed.

    W&B's own settings apply, such as WANDB_MODE=offline. After a kill the steps since the last checkpoint are sent
    twice, with the same values.
    """

    def __init__(self, folder: pathlib.Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(exist_ok=True)
        name = folder / WANDB_RUN
        run_id = str(read_json(name).get("id")) if name.exists() else secrets.token_hex(4)
        entity, _, project = project.rpartition("/")
        try:
            self._run = wandb.init(
                project=project,
                entity=entity or None,
                dir=folder.parent,
                id=run_id,
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, TimeoutError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"log.wandb is set, but Weights & Biases does not start ({reason}): run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from None
        if not name.exists():
            write_file(name, f'{{"id": "{run_id}"}}\n')
        self._run.define_metric("*", step_metric="step")  # W&B's own step counter would refuse repeated steps
        print(f"wandb       {printable(self._run.dir if self._run.offline else self._run.url)}", file=sys.stderr)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
