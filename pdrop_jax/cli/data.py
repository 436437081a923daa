"""``pdrop data``: check training data, and pack them into shards."""

import os
import pathlib
from typing import Annotated, Literal

import tyro

from pdrop_jax.cli.options import OutsideImages, unset
from pdrop_jax.errors import UserError, printable
from pdrop_jax.train.data.sources.manifest import RECORDS_PER_SHARD


def run(
    action: Annotated[tyro.conf.Positional[Literal["pack", "check"]], tyro.conf.arg(metavar="{pack,check}")],
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[
        tyro.conf.Positional[pathlib.Path | None], tyro.conf.arg(metavar="[OUT]", help_behavior_hint=" ")
    ] = None,
    images: Annotated[pathlib.Path | None, unset("DIR")] = None,
    outside_images: OutsideImages = False,
    records_per_shard: int = RECORDS_PER_SHARD,
    workers: Annotated[int | None, unset("N", "one for each CPU core")] = None,
) -> int:
    """Check training data record by record, or pack them into ArrayRecord shards.

    Both decode every picture and report what is invalid, by reason. Packing leaves invalid records out. If it is
    stopped, the same command packs the shards that are missing. Checking exits with code 1 if a record is invalid.

    Args:
      action: pack, or check, which writes nothing.
      source: Training data: JSON, JSON Lines, Parquet, WebDataset tar or ArrayRecord. A file, a folder of shards, or a
        quoted pattern such as 'data/train-*.parquet'.
      out: Folder of the shards; gs://BUCKET/NAME is one in a bucket.
      images: Folder that the names of pictures are relative to (default: the folder of SOURCE).
      outside_images: Allow pictures outside the --images folder, such as "../1.png".
      records_per_shard: Records for each shard.
      workers: Processes that read and decode pictures.
    """
    if (action == "pack") == (out is None):
        raise UserError(
            "Missing OUT. Usage: pdrop data pack SOURCE OUT"
            if out is None
            else f"check writes nothing, so {out} has no use. Usage: pdrop data check SOURCE"
        )
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, value, most in (("--workers", workers, 256), ("--records-per-shard", records_per_shard, 2**20)):
        if not 1 <= value <= most:
            raise UserError(f"{name} is {value}, it must be in 1..{most:,}")

    from pdrop_jax.inputs.messages import plural
    from pdrop_jax.train.data import pack
    from pdrop_jax.train.data.sources.open_source import open_source

    opened = open_source(source, None if images is None else str(images))
    if out is None:
        report = pack.check(opened, outside_images=outside_images, workers=workers)
        print("\n".join(report.lines()))
        return int(report.invalid.total() > 0)
    manifest = pack.pack(
        opened, out, records_per_shard=records_per_shard, outside_images=outside_images, workers=workers
    )
    print("\n".join(manifest.report.lines()))
    shards = sum(shard.records > 0 for shard in manifest.shards)
    counts = plural(manifest.records, "record"), plural(manifest.pictures, "picture"), plural(shards, "shard")
    print(f"{printable(out)}: {', '.join(counts)}, {manifest.bytes / 1e6:,.1f} MB")
    return 0
