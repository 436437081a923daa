"""Batches of a data set in the order of its plan, read ahead by grain."""

import dataclasses
import functools
import math
import multiprocessing
import os
import threading
import warnings
from collections import Counter

import grain
import jax
from absl import flags

from pdrop_jax.batch import Batch
from pdrop_jax.errors import UserError
from pdrop_jax.inputs import assemble
from pdrop_jax.train.data.batches import Planned
from pdrop_jax.train.data.index import Dataset, open_dataset

__all__ = ["Dataset", "Step", "check_batches", "open_dataset", "pipeline"]

THREADS = 4  # batches that are read at the same time without worker processes


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Step:
    """What one optimizer step takes.

    Attributes:
      batch: this process' rows.
      invalid: rows of it that weigh nothing, by reason.
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
) -> grain.IterDataset[Step]:
    """The batches of steps first..steps-1, epoch after epoch.

    Step i is the same batch whatever was read before and by however many workers: to resume is to say where.

    Args:
      batch_size: B, rows of one optimizer step in all processes. A process gets rows [p * B / P, (p + 1) * B / P).
      parts: what the rows will be cut into, over devices and one after the other; only checked here.
      workers: processes that read pictures; with 0 threads do.

    Raises:
      UserError: B cannot be shared out, or is more than the data set has rows; while iterating, a picture that cannot
        be read if ``data.invalid`` is "fail".
    """
    check_batches(dataset, batch_size, parts, process_count)
    share = batch_size // process_count
    rows = slice(process_index * share, (process_index + 1) * share)
    load = functools.partial(_load, dataset, batch_size, seed, rows)
    source = grain.MapDataset.range(first, steps).map(load)
    if not workers:
        return source.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS))
    if not flags.FLAGS.is_parsed():  # grain asks for its flags in the workers, and our command line is not absl's
        flags.FLAGS.mark_as_parsed()
    one_at_a_time = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return source.to_iter_dataset(one_at_a_time).mp_prefetch(options, worker_init_fn=_end_with_parent)


def _end_with_parent(_worker: int, _workers: int) -> None:
    """Run by a worker process when it starts: it ends with the run's process, even one that is killed.

    It would wait for room in a queue that nobody reads any more. The sentinel is a pipe whose other end the parent
    alone holds; PR_SET_PDEATHSIG would be sent when the thread ends that started the worker, and grain has one for it.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_batches(dataset: Dataset, batch_size: int, parts: int, process_count: int) -> None:
    """Raises UserError if ``pipeline`` cannot share a batch out, or the data set has not rows enough for one."""
    parts = math.lcm(parts, process_count)
    if batch_size < 1 or batch_size % parts:
        raise UserError(f"a batch of {batch_size} rows cannot be cut into {parts} parts: choose a multiple of {parts}")
    if len(dataset) < batch_size:
        raise UserError(
            f"{dataset.data.conversations} has {len(dataset)} usable rows, a batch takes {batch_size}: lower the batch "
            "size"
        )


def _load(dataset: Dataset, batch_size: int, seed: int, rows: slice, step: int) -> Step:
    # Pillow warns of metadata it finds odd, once for each wording: on a live terminal line that is noise.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    epoch, number = divmod(step, len(dataset) // batch_size)
    planned = _plan(dataset, batch_size, seed, epoch)[number]
    loaded = [dataset.row(row) for row in planned.rows[rows].tolist()]
    batch = assemble([row for row, _ in loaded], dataset.config, planned.bucket, planned.queries)
    return Step(batch, Counter(reason for _, reason in loaded if reason))


@functools.lru_cache(maxsize=2)
def _plan(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> list[Planned]:
    return dataset.plan(batch_size, seed, epoch)
