"""Pictures per second that one process reads and decodes, by the format of the training data.

Photos of 640 x 480 pixels are written as JSON with a folder, as Parquet with row groups of 100, as WebDataset tar files
and as packed shards. Formats take turns, each reading the same pictures in the same random order, and are compared
within a round; so is decoding from memory, the limit of the machine. Files are in the page cache of the system, and CPU
seconds of the process are counted, so that other programs matter little.

    python -m benchmarks.data
"""

import dataclasses
import io
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from pdrop_jax.inputs.images import read_image
from pdrop_jax.train.data.examples import read_record
from pdrop_jax.train.data.pack import pack
from pdrop_jax.train.data.sources.open_source import open_source
from pdrop_jax.train.data.sources.source import Source, reference_finder

SHARDS = 4
IN_ORDER = "Parquet, in order"


@dataclasses.dataclass(frozen=True)
class Flags:
    pictures: int = 2000
    sample: int = 200  # pictures that each format reads in a round
    rounds: int = 9


def main(flags: Flags) -> None:
    """Prints a table."""
    rng = np.random.default_rng(0)
    photos = [photo(rng) for _ in range(flags.pictures)]
    with tempfile.TemporaryDirectory() as name:
        places = write_formats(pathlib.Path(name), photos)
        readers = {"decoding alone": lambda n: photos[n]}
        readers |= {kind: reader(source) for kind, source in places.items()}
        rates: dict[str, list[float]] = {kind: [] for kind in [*readers, IN_ORDER]}
        for _ in tqdm(range(flags.rounds), unit=" rounds", disable=None):
            chosen = rng.choice(flags.pictures, min(flags.sample, flags.pictures), replace=False).tolist()
            for kind in rng.permutation(list(rates)).tolist():
                if kind == IN_ORDER:
                    rates[kind].append(timed(readers["Parquet"], sorted(chosen)))
                else:
                    rates[kind].append(timed(readers[kind], chosen))
        began = time.process_time()
        packed = pack(places["JSON and a folder"], pathlib.Path(name) / "again").pictures
        packing = packed / (time.process_time() - began)
    plain = rates["JSON and a folder"]
    kilobytes = statistics.mean(map(len, photos)) / 1e3
    print(f"{flags.pictures} photos of {kilobytes:.0f} KB, {flags.rounds} rounds of {flags.sample} in one process\n")
    print("| format | pictures per CPU second | ratio to JSON and a folder: median, range |\n|---|---|---|")
    for kind, found in rates.items():
        ratios = sorted(one / other for one, other in zip(found, plain, strict=True))
        middle = statistics.median(ratios)
        print(f"| {kind} | {statistics.median(found):.0f} | {middle:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f} |")
    print(f"\npacking JSON and a folder: {packing:.0f} pictures per CPU second")


def photo(rng: np.random.Generator) -> bytes:
    """The JPEG file of a random picture of 640 x 480 pixels, smooth as a photo is."""
    coarse = Image.fromarray(rng.integers(256, size=(48, 64, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_formats(folder: pathlib.Path, photos: list[bytes]) -> dict[str, Source]:
    """The same records in each format."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import webdataset

    for part in ("images", "parquet", "tar"):
        (folder / part).mkdir()
    said = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Colours."}]
    records = [{"id": str(n), "image": f"{n}.jpg", "conversations": said} for n in range(len(photos))]
    (folder / "data.json").write_text(json.dumps(records))
    for n, content in enumerate(photos):
        (folder / f"images/{n}.jpg").write_bytes(content)
    for shard, rows in enumerate(np.array_split(np.arange(len(photos)), SHARDS)):
        table = [records[n] | {"image": {"bytes": photos[n], "path": f"{n}.jpg"}} for n in rows]
        name = f"train-{shard:05d}-of-{SHARDS:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(table), folder / "parquet" / name, row_group_size=100)
        with webdataset.TarWriter(str(folder / f"tar/{shard:05d}.tar")) as writer:
            for n in rows:
                writer.write({"__key__": f"{n:09d}", "json": records[n], "jpg": photos[n]})
    plain = open_source(str(folder / "data.json"), str(folder / "images"))
    pack(plain, folder / "packed", records_per_shard=-(-len(photos) // SHARDS))
    return {
        "JSON and a folder": plain,
        "Parquet": open_source(str(folder / "parquet")),
        "WebDataset tar": open_source(str(folder / "tar")),
        "packed shards": open_source(str(folder / "packed")),
    }


def reader(source: Source) -> Callable[[int], str | bytes]:
    """A function that reads the picture of a record."""
    find = reference_finder(source.images)
    references = [read_record(record, find)[1][0] for record in source.records()]
    return lambda n: source.read(references[n])


def timed(read: Callable[[int], str | bytes], numbers: list[int]) -> float:
    """Pictures per CPU second, each read and decoded."""
    began = time.process_time()
    for n in numbers:
        read_image(read(n))
    return len(numbers) / (time.process_time() - began)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
