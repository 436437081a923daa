"""Batches of a data set in planned order, prefetched by grain."""

import dataclasses
import functools
import math
import warnings
from collections import Counter
from collections.abc import Iterable

import jax

from pdrop_jax.batch import Batch
from pdrop_jax.errors import UserError
from pdrop_jax.inputs import assemble
from pdrop_jax.train.data.batches import Planned
from pdrop_jax.train.data.index import Dataset, open_dataset
from pdrop_jax.train.data.sources.packed_source import import_grain
from pdrop_jax.train.data.workers import begin_worker

__all__ = ["Dataset", "Step", "check_batches", "import_grain", "open_dataset", "pipeline"]

THREADS = 4  # batches that are loaded in parallel without worker processes


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Step:
    """Input of one optimizer step.

    Attributes:
      batch: the rows of this process.
      invalid: number of rows that are excluded from the loss, by reason.
    """

    batch: Batch
    invalid: Counter[str]


def pipeline(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    steps: int,
    first: int = 0,
    parts: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterable[Step]:
    """Yields the batches of steps first..steps-1, epoch after epoch.

    The batch of a step does not depend on earlier steps or on the number of workers, so a run resumes by passing
    ``first``.

    Args:
      batch_size: B, rows per optimizer step over all processes. Process p of P gets rows [p * B / P, (p + 1) * B / P).
      parts: number of equal parts that the batch will be split into, over devices and microbatches; only checked here.
      workers: number of worker processes that load images; 0 uses threads.

    Raises:
      UserError: grain is not installed, B is not divisible as required, or B exceeds the number of rows. While
        iterating, an image cannot be read and ``data.invalid`` is "fail".
    """
    grain = import_grain()
    check_batches(dataset, batch_size, parts, process_count)
    share = batch_size // process_count
    rows = slice(process_index * share, (process_index + 1) * share)
    load = functools.partial(_load, dataset, batch_size, seed, rows)
    source = grain.MapDataset.range(first, steps).map(load)
    if not workers:
        return source.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS))
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads absl flags in its workers, but our command line does not use absl
        flags.FLAGS.mark_as_parsed()
    one_at_a_time = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return source.to_iter_dataset(one_at_a_time).mp_prefetch(options, worker_init_fn=begin_worker)


def check_batches(dataset: Dataset, batch_size: int, parts: int, process_count: int) -> None:
    """Raises UserError if a batch cannot be split evenly, or if the data set has too few rows for one batch."""
    parts = math.lcm(parts, process_count)
    if batch_size < 1 or batch_size % parts:
        raise UserError(f"a batch of {batch_size} rows is not divisible by {parts}: choose a multiple of {parts}")
    if len(dataset) < batch_size:
        raise UserError(
            f"{dataset.data.name} has {len(dataset)} usable rows, but the batch size is {batch_size}: "
            "lower run.batch_size"
        )


def _load(dataset: Dataset, batch_size: int, seed: int, rows: slice, step: int) -> Step:
    # Pillow warns about unusual image metadata, which would disturb the progress bar.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    epoch, number = divmod(step, len(dataset) // batch_size)
    planned = _plan(dataset, batch_size, seed, epoch)[number]
    loaded = [dataset.row(row) for row in planned.rows[rows].tolist()]
    batch = assemble([row for row, _ in loaded], dataset.config, planned.bucket, planned.queries)
    return Step(batch, Counter(reason for _, reason in loaded if reason))


@functools.lru_cache(maxsize=2)
def _plan(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> list[Planned]:
    return dataset.plan_epoch(batch_size, seed, epoch)
