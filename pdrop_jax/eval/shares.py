"""How several processes share the batches of one command, without talking to each other."""

import dataclasses

from pdrop_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Share:
    """The batches of one process: those whose number in the plan leaves the remainder ``index`` modulo ``count``.

    All processes plan the same batches, so that answers do not depend on the number of processes.

    Raises:
      UserError: ``index`` is not in 0..count - 1.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(
                f"process {self.index} of {self.count}: processes are numbered 0 to {self.count - 1}"
                if self.count > 0
                else f"the number of processes must be at least 1, got {self.count}"
            )

    def __contains__(self, batch: int) -> bool:
        return batch % self.count == self.index

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"
