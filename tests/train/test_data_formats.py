"""Each format of training data gives the same rows, and what is damaged, foreign or hostile is refused in one line."""

import base64
import dataclasses
import gzip
import json
import pathlib
import pickle
import random
import shutil
import sys
import tarfile
import zipfile

import formats
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import one_line
from tiny_run import CONFIG, TOKENIZER

from pdrop_jax.config import Tiling
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.messages import Medium, Message
from pdrop_jax.train.data.pack import pack
from pdrop_jax.train.data.pipeline import open_dataset, pipeline
from pdrop_jax.train.data.sources.open_source import open_source
from pdrop_jax.train.data.sources.packed_source import pack_index, pack_record, record_text
from pdrop_jax.train.data.sources.source import reference_finder
from pdrop_jax.train.recipe import DataRecipe, SourceRecipe

TILED = dataclasses.replace(CONFIG, tiling=Tiling.next(28))


def opened(path, images=None, config=CONFIG, **settings):
    return open_dataset(DataRecipe(path, images, max_length=128, text_buckets=(64,), **settings), config, TOKENIZER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set in each format: name -> (path, folder of images)."""
    folder = tmp_path_factory.mktemp("formats")
    single = [record for record in formats.records() if len(record["image"]) < 2]
    places = {name: formats.write(folder, name, single if name == "parquet" else None) for name in formats.NAMES}
    for name in ("json", "messages_parquet"):
        source = open_source(*places[name])
        pack(source, folder / f"packed_{name}", records_per_shard=5)
        places[f"packed_{name}"] = str(folder / f"packed_{name}"), None
    return folder, places


@pytest.fixture(scope="module")
def expected(folder):
    return {config: opened(*folder[1]["json"], config) for config in (CONFIG, TILED)}


@pytest.mark.parametrize("name", [*formats.NAMES[1:], "packed_json", "packed_messages_parquet"])
def test_a_format_gives_the_rows_of_json(folder, expected, name):
    for config, plain in expected.items():
        found = opened(*folder[1][name], config)
        rows = [row for row in range(len(plain)) if name != "parquet" or plain.sizes.pictures[row] < 2]
        assert len(found) == len(rows)
        assert not found.invalid
        copy = pickle.loads(pickle.dumps(found))  # as a worker process gets it
        for n, row in enumerate(rows):
            np.testing.assert_array_equal(found.sizes.images[n], plain.sizes.images[row])
            (one, reason), (other, _) = copy.row(n), plain.row(row)
            assert reason is None
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_array_equal(one.labels, other.labels)
            for image, same in zip(one.images, other.images, strict=True):
                np.testing.assert_array_equal(image.crops, same.crops)


def test_pictures_inside_of_json(tmp_path, folder, expected):
    """Messages with base64: as an OpenAI URL, as transformers' "base64", and in the list of images."""
    given = [formats.as_messages(record, named=True) for record in formats.records()]
    for number, record in enumerate(given):
        for message in record["messages"]:
            for item in message["content"]:
                if item["type"] == "image":
                    data = base64.b64encode(formats.picture(int(item.pop("image")[0]))).decode()
                    url = f"data:image/png;base64,{data}"
                    if number % 3 == 1:
                        item |= {"type": "image_url", "image_url": {"url": url}}
                    elif number % 2:
                        item["base64"] = data
                    else:
                        record.setdefault("images", []).append(url)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, given)))
    found = opened(str(tmp_path / "data.jsonl"))
    assert not found.invalid
    for row in range(len(found)):
        for image, same in zip(found.row(row)[0].images, expected[CONFIG].row(row)[0].images, strict=True):
            np.testing.assert_array_equal(image.crops, same.crops)


def test_worker_processes_read_a_mixture_of_formats(folder):
    sources = tuple(SourceRecipe(folder[1][name][0]) for name in ("messages_tar", "parquet_lists", "packed_json"))
    dataset = open_dataset(DataRecipe(sources=sources, max_length=128), CONFIG, TOKENIZER)
    here, there = (list(pipeline(dataset, 4, 0, 9, workers=workers)) for workers in (0, 1))
    for one, other in zip(here, there, strict=True):
        assert not one.invalid
        for name in ("token_ids", "labels", "crops"):
            np.testing.assert_array_equal(getattr(one.batch, name), getattr(other.batch, name))


def test_a_pattern_and_the_order_of_shards(folder, expected):
    path, _ = folder[1]["parquet_lists"]
    found = opened(f"{path}/train-*.parquet")
    np.testing.assert_array_equal(found.ids.values, expected[CONFIG].ids.values)


# --- which files


def test_which_files_a_folder_holds(tmp_path):
    def refused(path=tmp_path):
        with pytest.raises(UserError) as error:
            open_source(str(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "holds no training data: expected files that end in .arrayrecord, " in refused()
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").touch()
    (tmp_path / "data/a.jsonl").write_text("{}")
    assert f"holds no training data: did you mean {tmp_path}/data?" in refused()
    assert "matches no files" in refused(tmp_path / "data/*.tar")
    (tmp_path / "train-00001-of-00003.parquet").write_bytes(b"PAR1")
    assert "lacks 2 of 3 shards, the first is number 0" in refused()
    (tmp_path / "test-00000-of-00001.parquet").touch()
    assert f"several sets of shards (test, train): choose one, such as {tmp_path}/train-*.parquet" in refused()
    (tmp_path / "a.tar").touch()
    assert "files of several formats (Parquet, tar)" in refused()


FOREIGN = {
    "gzip": "is a gzip file, which cannot be read at random: unpack it",
    "zip": "is a ZIP archive: unpack it",
    "arrow": "is an Arrow file: write Parquet with Dataset.to_parquet",
    "pointer": "is a Git LFS pointer in place of the file: run git lfs pull",
    "picture": "is a PNG picture: expected JSON, JSON Lines, Parquet, WebDataset tar files",
    "pickle": "is a pickle: expected JSON",
    "binary": "is a binary file of an unknown format: expected JSON",
    "columns": "is a Parquet file with the columns caption, url, but training records have conversations or messages",
    "keys": "contains no usable rows: all 1 are invalid (1 no conversations or messages); row 1: its keys are images,",
    "object": "is neither a JSON list nor JSON Lines: none of its 4 lines is a JSON object",
    "empty list": "contains no conversations: expected at least one record",
    "empty tar": "contains no conversations: expected at least one record",
    "empty Parquet": "contains no conversations: expected at least one record",
    "captions": "(2 malformed JSON); row 1: a has 0 .json",
}


def write_foreign(path, kind):
    if kind == "gzip":
        path.write_bytes(gzip.compress(b"{}"))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema([("a", pa.int32())])):
            pass
    elif kind == "columns":
        pq.write_table(pa.table({"caption": ["a"], "url": ["b"]}), path)
    elif kind == "empty Parquet":
        pq.write_table(pa.table({"messages": pa.array([], pa.list_(pa.string()))}), path)
    elif kind == "empty tar":
        formats.tar_of(path, [])
    elif kind == "captions":
        formats.tar_of(path, [("a.jpg", b"a"), ("a.txt", b"a"), ("b.jpg", b"b")])
    else:
        texts = {"keys": '{"images": [], "annotations": []}', "object": '{\n"a": 1,\n"b": 2\n}', "empty list": "[]"}
        other = {"pointer": b"version https://git-lfs.github.com/spec/v1\n", "pickle": pickle.dumps({}, 4)}
        other |= {"picture": formats.picture(0), "binary": bytes(range(64))}
        path.write_bytes(other.get(kind) or texts[kind].encode())


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_kinds_are_named(tmp_path, kind):
    write_foreign(tmp_path / "data", kind)
    with pytest.raises(UserError) as error:
        opened(str(tmp_path / "data"))
    assert FOREIGN[kind] in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("parquet", "pyarrow.parquet", "parquet"), ("packed_json", "grain", "train")]
)
def test_a_package_that_is_missing_is_named_with_its_extra(folder, monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"which is not installed: pip install 'pdrop-jax\[{extra}\]'$"):
        opened(folder[1][name][0])


# --- damage


def shards_of(path):
    return sorted(entry for entry in path.iterdir() if entry.name != "manifest.json")


@pytest.fixture(params=["messages_tar", "parquet_lists", "packed_json"])
def shard(request, folder, tmp_path):
    """One shard of two by itself, where it may be damaged."""
    return pathlib.Path(shutil.copy(shards_of(folder[0] / request.param)[0], tmp_path))


def test_a_shard_that_was_cut_short(shard):
    whole = shard.read_bytes()
    marks = 10_000 if shard.suffix == ".tar" else 1  # zeros at its end, of which two blocks have to be there
    for size in (0, 1, 60, 300, 600, len(whole) // 2, len(whole) - marks):
        shard.write_bytes(whole[:size])
        with pytest.raises(UserError) as error:
            opened(str(shard))
        assert str(shard) in str(error.value)
        assert "\n" not in str(error.value)
        assert any(words in str(error.value) for words in ("was cut short", "is empty")), size


def test_no_bit_of_a_shard_does_more_than_a_line(shard):
    """A flipped bit is refused, skips a row, or changes a text or a picture."""
    whole = shard.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        at = rng.randrange(min(len(whole), 9000)) if rng.random() < 0.7 else rng.randrange(len(whole))
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with one_line(at):
            found = opened(str(shard))
            for row in range(len(found)):
                found.row(row)


def test_a_shard_that_is_lost_while_training(folder, tmp_path):
    """What is damaged later is a picture that cannot be read, of which data.invalid decides."""
    for name in ("messages_tar", "parquet_lists", "packed_json"):
        place = tmp_path / name
        shutil.copytree(folder[0] / name, place)
        whole = opened(str(place))
        found = pickle.loads(pickle.dumps(whole))  # which has no file open
        shards_of(place)[0].unlink()
        reasons = [found.row(row)[1] for row in range(len(found))]
        assert "corrupt image" in reasons
        assert None in reasons
        failing = dataclasses.replace(found, data=dataclasses.replace(found.data, invalid="fail"))
        with pytest.raises(UserError, match=r"row \d+: .*: fix the image, or set data.invalid"):
            [failing.row(row) for row in range(len(found))]


# --- files are not trusted


def test_the_names_in_a_tar_are_never_files(tmp_path):
    record = json.dumps(formats.records(2)[1]).encode()
    link, device = tarfile.TarInfo("a.1.png"), tarfile.TarInfo("../../a.2.png")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    members = [("../../../a.json", record), ("../../../a.png", formats.picture(1)), (link, b""), (device, b"")]
    path = formats.tar_of(tmp_path / "a.tar", [*members, ("a.json", b'{"a": ' + b"[" * 99_999), ("._b.json", b"")])
    before = sorted(tmp_path.rglob("*"))
    found = opened(path)
    assert (len(found), found.invalid) == (1, {"malformed JSON": 1})
    assert found.row(0)[1] is None
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("at:0:0:100", "no image file"),
        ("data:\0at:0:0:100", "malformed image entry"),
        ("../secret.png", "image outside of data.images"),
        ({"bytes": None, "path": "/etc/passwd"}, "image outside of data.images"),
        ({"bytes": 5}, "malformed image entry"),
        ({}, "malformed image entry"),
        ([["0.png"]], "malformed image entry"),
        ("half \ud83d", "malformed image entry"),
    ],
)
def test_no_record_names_a_place_in_a_shard(tmp_path, entry, reason):
    formats.write_images(tmp_path / "images")
    text = json.dumps([formats.records(2)[1] | {"image": entry}, formats.records(1)[0]])
    (tmp_path / "a.json").write_text(text)
    assert opened(str(tmp_path / "a.json"), str(tmp_path / "images")).invalid == {reason: 1}


def test_a_file_with_the_name_of_a_place_is_a_file(tmp_path):
    (tmp_path / "at:0:0:9").write_bytes(formats.picture(1))
    reference = reference_finder(str(tmp_path))("at:0:0:9")
    (tmp_path / "a.json").write_text("[]")
    source = open_source(str(tmp_path / "a.json"))
    assert pathlib.Path(source.read(reference)).read_bytes() == formats.picture(1)


def write_array_record(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


TEXT = record_text([Message("user", (Medium(), "What?")), Message("assistant", ("A",))])


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        msgpack.packb(5),
        msgpack.packb({}),
        msgpack.packb([TEXT]),
        msgpack.packb([[TEXT]]),
        msgpack.packb([["[]", []]]),
        msgpack.packb([["{", []]]),
        msgpack.packb([[b"\xff", []]]),
        msgpack.packb([[TEXT, [[0, 1]]]]),
        msgpack.packb([[TEXT, [[20, 10**9]]]]),
        msgpack.packb([[TEXT, [[20, 30.5]]]]),
        msgpack.packb([[TEXT, [[20, 30]]]] * 2),
    ],
)
def test_an_array_record_file_that_is_no_shard_of_ours(tmp_path, index):
    path = write_array_record(tmp_path / "a.arrayrecord", [pack_record(TEXT, [formats.picture(1)]), index])
    with pytest.raises(UserError, match=r"a.arrayrecord has (no index of|1 records, but 2 in its index)"):
        opened(path)


@pytest.mark.parametrize(
    "record", [b"", b"\xc1", msgpack.packb([TEXT]), msgpack.packb([TEXT, ["a"]]), msgpack.packb([TEXT, []])]
)
def test_a_record_that_is_none_of_ours_is_a_corrupt_image(tmp_path, record):
    index = pack_index(((TEXT, ((20, 30),)),))
    found = opened(write_array_record(tmp_path / "a.arrayrecord", [record, index]))
    assert found.row(0)[1] == "corrupt image"


def test_a_picture_of_another_size_than_planned_is_a_corrupt_image(tmp_path):
    """There may be no room for it, whether the index of a shard is wrong or a file has been replaced."""
    index = pack_index(((TEXT, ((60, 60),)),))
    packed = write_array_record(tmp_path / "a.arrayrecord", [pack_record(TEXT, [formats.picture(1)]), index])
    assert opened(packed, config=TILED).row(0)[1] == "corrupt image"
    assert opened(packed).row(0)[1] is None
