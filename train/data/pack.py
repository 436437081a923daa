"""Check a data set record by record, and pack it into ArrayRecord shards, which training reads at random.

A shard holds the valid ones of ``records_per_shard`` records in a row, whatever the number of workers. The manifest is
rewritten after each shard, so packing that was stopped goes on with the shards that are missing, and the result has the
same bytes.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from pdrop_jax.errors import UserError, one_line, printable
from pdrop_jax.inputs.images import decode_image
from pdrop_jax.inputs.messages import Message
from pdrop_jax.io import check_file, read_bytes, write_file, written_aside
from pdrop_jax.paths import as_path, files_below, in_bucket, is_file, lexists, probe
from pdrop_jax.train.data.examples import read_record
from pdrop_jax.train.data.invalid import CORRUPT, NO_FILE, InvalidRecord, Report, check_report
from pdrop_jax.train.data.sources.manifest import (
    MANIFEST,
    RECORDS_PER_SHARD,
    Manifest,
    Shard,
    fingerprint,
    merged,
    read_manifest,
    shard_name,
)
from pdrop_jax.train.data.sources.packed_source import import_grain, pack_index, pack_record, record_text
from pdrop_jax.train.data.sources.source import PICTURE_BYTES, Source, reference_finder
from pdrop_jax.train.data.workers import in_order


class Parsed(NamedTuple):
    """A record whose pictures are still to be read."""

    number: int
    identity: Any
    messages: list[Message]
    pictures: list[str]


class Task(NamedTuple):
    """The records of a shard: those that could be parsed, and the report on all."""

    number: int
    records: list[Parsed]
    report: Report


class Picture(NamedTuple):
    """The file of a picture that can be decoded, and its height and width in pixels."""

    content: bytes
    size: tuple[int, int]


def check(source: Source, *, outside_images: bool = False, workers: int = 1) -> Report:
    """Reads every record of ``source`` and decodes every picture.

    Args:
      outside_images: see ``source.file_finder``.
      workers: number of processes that decode; 1 is this one.

    Raises:
      UserError: a file is damaged, or there are no records.
    """
    tasks = _tasks(source, RECORDS_PER_SHARD, outside_images)
    shards = in_order(functools.partial(_make_shard, source, None), tasks, workers)
    report = merged(shard.report for shard in _shown(shards, "checking", source))
    if not report.seen:
        check_report(report, source.path)
    return report


def pack(
    source: Source,
    out: str | os.PathLike,
    *,
    records_per_shard: int = RECORDS_PER_SHARD,
    outside_images: bool = False,
    workers: int = 1,
) -> Manifest:
    """Writes the valid records of ``source`` as shards to the folder ``out``, or those of the shards that it lacks.

    Args:
      out: local, or in a bucket, to which each shard is uploaded when it is whole.
      records_per_shard: records of the source, valid or not, for each shard.
      outside_images, workers: see ``check``.

    Raises:
      UserError: a file is damaged, no record is valid, the disk is full, or ``out`` holds something else.
    """
    import_grain()  # which brings the package that writes ArrayRecord
    out = as_path(out)
    if in_bucket(out):
        probe(out)
    manifest = _begin(out, Manifest(fingerprint(source.files), records_per_shard, outside_images), source)
    sizes = files_below(out)
    done = {shard.number: shard for shard in manifest.shards if shard.is_among(sizes)}
    if manifest.complete and len(done) == len(manifest.shards):
        return manifest
    tasks = (task for task in _tasks(source, records_per_shard, outside_images) if task.number not in done)
    shards = in_order(functools.partial(_make_shard, source, out), tasks, workers)
    for shard in _shown(shards, "packing", source):
        done[shard.number] = shard
        manifest = _write(out, manifest, done, complete=False)
    check_report(manifest.report, source.path)
    return _write(out, manifest, done, complete=True)


def _begin(out: pathlib.Path, new: Manifest, source: Source) -> Manifest:
    """The manifest of what ``out`` already holds of ``source``."""
    if not lexists(out):
        return new
    if not out.is_dir():
        raise UserError(f"{out} is a file, expected the name of a folder to write")
    found = read_manifest(out)
    if found is None:
        if any(out.iterdir()):
            raise UserError(f"{out} exists and is not empty: choose another folder")
        return new
    if found.fingerprint != new.fingerprint:
        raise UserError(f"{out} holds shards of other data than {source.path}: choose another folder")
    for name, option in (("records_per_shard", "--records-per-shard"), ("outside_images", "--outside-images")):
        if (before := getattr(found, name)) != (now := getattr(new, name)):
            raise UserError(
                f"{out} was packed with another {option} ({before}, now {now}): choose another folder, or the same "
                "option"
            )
    return found


def _write(out: pathlib.Path, manifest: Manifest, done: dict[int, Shard], complete: bool) -> Manifest:
    manifest = manifest.holding([done[number] for number in sorted(done)], complete)
    if manifest.records:  # or the folder has not been made
        write_file(out / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=1), overwrite=True)
    return manifest


def _tasks(source: Source, size: int, outside: bool) -> Iterator[Task]:
    find = reference_finder(source.images, outside)
    records = enumerate(source.records(), 1)
    for shard in itertools.count():
        parsed, report = [], Report()
        for number, record in itertools.islice(records, size):
            report.seen += 1
            try:
                messages, pictures = read_record(record, find)
                parsed.append(Parsed(number, record.get("id"), messages, pictures))
            except InvalidRecord as error:
                report.add(number, error)
        if not report.seen:
            return
        yield Task(shard, parsed, report)


def _make_shard(source: Source, out: pathlib.Path | None, task: Task) -> Shard:
    """Reads and decodes the pictures of a shard's records, and writes the shard unless ``out`` is None."""
    report, size = task.report, 0
    valid = _valid(source, task.records, report)
    index = []  # text of each record, sizes of its pictures

    def packed() -> Iterator[bytes]:
        for parsed, pictures in valid:
            text = record_text(parsed.messages, parsed.identity)
            index.append((text, tuple(picture.size for picture in pictures)))
            yield pack_record(text, [picture.content for picture in pictures])
        if index:
            yield pack_index(tuple(index))

    records = packed()
    if out is None:
        collections.deque(records, maxlen=0)
    else:
        size = _write_records(out / shard_name(task.number), records)
    return Shard(
        number=task.number,
        records=len(index),
        pictures=sum(len(sizes) for _, sizes in index),
        bytes=size,
        seen=report.seen,
        invalid=dict(sorted(report.invalid.items())),
        examples={reason: tuple(named) for reason, named in sorted(report.examples.items())},
    )


def _valid(source: Source, records: Iterable[Parsed], report: Report) -> Iterator[tuple[Parsed, list[Picture]]]:
    """Records with their pictures; those with pictures that cannot be decoded go to the report."""
    for parsed in records:
        try:
            pictures = [_picture(source, reference) for reference in parsed.pictures]
        except InvalidRecord as error:
            report.add(parsed.number, error)
            continue
        yield parsed, pictures


def _picture(source: Source, reference: str) -> Picture:
    try:
        found, name = source.read(reference), "the picture"
        if isinstance(found, str):
            if not is_file(found):
                raise InvalidRecord(NO_FILE, reference)
            found, name = read_bytes(found, PICTURE_BYTES), reference
        return Picture(found, decode_image(found, name).size[::-1])
    except UserError as error:
        raise InvalidRecord(CORRUPT, str(error)) from None


def _write_records(path: pathlib.Path, records: Iterator[bytes]) -> int:
    """Writes an ArrayRecord file, unless there are no records. Returns its size in bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    first = next(records, None)
    if first is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as new:
        try:
            # One record a chunk, so that one is read without others. Pictures are compressed already.
            writer = ArrayRecordWriter(str(new), "group_size:1,uncompressed")
            for record in itertools.chain([first], records):
                writer.write(record)
            writer.close()
            return check_file(new)
        except RuntimeError as error:
            raise UserError(f"{path} cannot be written ({one_line(error, 200)})") from None


def _shown(shards: Iterator[Shard], what: str, source: Source) -> Iterator[Shard]:
    """``shards``, with a bar of their records on a terminal."""
    name = printable(os.path.basename(source.path.rstrip("/")))
    with tqdm(desc=f"{what} {name}", unit=" records", disable=None) as bar:
        for shard in shards:
            bar.update(shard.seen)
            yield shard
