"""The log of a run in a bucket: written on the local disk, and uploaded before each checkpoint.

An object cannot be appended to. Uploading the log whenever a checkpoint is saved keeps one log.jsonl, under the name
that it has in a local run folder. A killed process loses nothing by it: when a run is resumed, lines after its last
checkpoint are removed anyway, because their steps are run again.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import jax

from pdrop_jax.errors import UserError
from pdrop_jax.paths import BucketPath, files_below
from pdrop_jax.train.writers import WANDB, WANDB_RUN


class Spool:
    """Uploads the files of a local folder.

    Attributes:
      folder: the local folder; the run folder itself unless that is in a bucket.
    """

    def __init__(self, folder: pathlib.Path, target: BucketPath | None = None) -> None:
        self.folder, self._target = folder, target
        self._sizes: dict[str, int] = {}

    def upload(self) -> None:
        """Uploads the files that have grown since the last upload; raises UserError if the bucket cannot be written."""
        if self._target is None or jax.process_index():
            return
        sizes = files_below(self.folder)
        for name, size in sizes.items():
            if size != self._sizes.get(name):
                (self._target / name).upload(self.folder / name)
        self._sizes = sizes


@contextlib.contextmanager
def spooled(run: pathlib.Path) -> Iterator[Spool]:
    """A ``Spool`` for the run folder ``run``, with its log and its W&B run. It is uploaded at the end as well."""
    if not isinstance(run, BucketPath):
        yield Spool(run)
        return
    with tempfile.TemporaryDirectory(prefix="pdrop-") as name:
        spool = Spool(pathlib.Path(name), run)
        started = run / WANDB / WANDB_RUN
        for path in (*run.glob("log*.jsonl"), *([started] if started.exists() else [])):
            copy = spool.folder / path.relative_to(run)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
        spool._sizes = files_below(spool.folder)
        try:
            yield spool
        except BaseException:
            with contextlib.suppress(UserError):  # the first error says what is wrong
                spool.upload()
            raise
        spool.upload()
