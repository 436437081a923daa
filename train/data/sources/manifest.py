"""manifest.json: what a folder of packed shards holds, and how far packing has come."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

from pydantic import Field

from pdrop_jax.errors import UserError
from pdrop_jax.io import check_file, read_json
from pdrop_jax.paths import as_path, files_below, lexists
from pdrop_jax.schema import NO_OTHER_KEYS, validated
from pdrop_jax.train.data.invalid import Report
from pdrop_jax.train.data.sources.files import open_binary

MANIFEST = "manifest.json"
SUFFIX = ".arrayrecord"
RECORDS_PER_SHARD = 2048
ENDS = 2**16  # bytes at both ends of each file that belong to its fingerprint

Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of the shards, and what was left out of it.

    Attributes:
      number: place in the order of the records, from 0.
      records: records in the file; without any, there is no file.
      bytes: size of the file.
      seen, invalid, examples: see ``Report``.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    number: Count
    records: Count
    pictures: Count
    bytes: Count
    seen: Count
    invalid: dict[str, Count]
    examples: dict[str, tuple[tuple[Count, str], ...]]

    @property
    def name(self) -> str:
        return shard_name(self.number)

    @property
    def report(self) -> Report:
        return Report(
            self.seen, Counter(self.invalid), {reason: list(named) for reason, named in self.examples.items()}
        )

    def is_among(self, sizes: Mapping[str, int]) -> bool:
        """Whether the file is among those with these names and sizes in bytes."""
        return not self.records or sizes.get(self.name) == self.bytes


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards.

    Attributes:
      fingerprint: of the files that were packed.
      records_per_shard: records of the source, valid or not, for each shard.
      outside_images: whether pictures outside of the folder of images were taken.
      complete: whether all records have been packed.
      records, pictures, bytes: totals of the shards.
    """

    __pydantic_config__ = NO_OTHER_KEYS

    fingerprint: str
    records_per_shard: Count
    outside_images: bool
    complete: bool = False
    records: Count = 0
    pictures: Count = 0
    bytes: Count = 0
    shards: tuple[Shard, ...] = ()

    @property
    def report(self) -> Report:
        return merged(shard.report for shard in self.shards)

    def holding(self, shards: Sequence[Shard], complete: bool) -> "Manifest":
        """This manifest with other shards and their totals."""
        totals = {name: sum(getattr(shard, name) for shard in shards) for name in ("records", "pictures", "bytes")}
        return dataclasses.replace(self, shards=tuple(shards), complete=complete, **totals)


def shard_name(number: int) -> str:
    return f"{number:05d}{SUFFIX}"


def merged(reports: Iterable[Report]) -> Report:
    """The report on all records of ``reports``."""
    found = Report()
    for report in reports:
        found.merge(report)
    return found


def read_manifest(folder: str | os.PathLike) -> Manifest | None:
    """The manifest in a folder, or None. Raises UserError if it is malformed."""
    path = as_path(folder) / MANIFEST
    return validated(Manifest, read_json(path), str(path)) if lexists(path) else None


def check_complete(folder: str | os.PathLike, files: Sequence[str]) -> None:
    """Raises UserError if packing into ``folder`` was not completed, or if shards are missing or have another size."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.complete:
        raise UserError(f"{folder} holds shards, but packing was not completed: run the same pdrop data pack again")
    expected = [shard for shard in manifest.shards if shard.records]
    sizes = files_below(as_path(folder))
    damaged = [shard.name for shard in expected if not shard.is_among(sizes)]
    if damaged:
        raise UserError(
            f"{folder} lacks {len(damaged)} of {len(expected)} shards or has them in part, the first is {damaged[0]}: "
            "copy them again, or run the same pdrop data pack again"
        )
    unknown = sorted({os.path.basename(file) for file in files} - {shard.name for shard in expected})
    if unknown:
        raise UserError(f"{folder} holds {unknown[0]}, which its {MANIFEST} does not name: remove it")


def fingerprint(files: Sequence[str]) -> str:
    """Hash of the names, sizes and the first and last 64 KiB of files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = check_file(path)
        digest.update(f"{os.path.basename(path)}\0{size}\0".encode("utf-8", "surrogateescape"))
        with open_binary(path) as file:
            digest.update(file.read(ENDS))
            file.seek(max(size - ENDS, 0))
            digest.update(file.read(ENDS))
    return digest.hexdigest()
