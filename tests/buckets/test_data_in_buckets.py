"""Training data in a bucket: every format gives what it gives on a local disk, and shards are packed there."""

import formats
import pytest
from test_training import upload

from pdrop_jax.errors import UserError
from pdrop_jax.io import read_bytes
from pdrop_jax.paths import as_path, files_below
from pdrop_jax.train.data.examples import read_record
from pdrop_jax.train.data.pack import check, pack
from pdrop_jax.train.data.sources.open_source import open_source
from pdrop_jax.train.data.sources.source import reference_finder

SIZE = 4  # records for each shard


def contents(source):
    """Messages and the bytes of the pictures of each record, the pictures read last to first."""
    find = reference_finder(source.images)
    found = [read_record(record, find) for record in source.records()]
    pictures = [[content(source.read(reference)) for reference in references] for _, references in reversed(found)]
    return [messages for messages, _ in found], pictures[::-1]


def content(found):
    return found if isinstance(found, bytes) else read_bytes(found)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("format", ["json", "parquet_lists", "messages_tar"])
def test_a_format_in_a_bucket(local, bucket, format):
    path, images = formats.write(local / bucket.parts[1], format)
    root = local / bucket.parts[1]
    upload(root, bucket)
    there = [None if place is None else str(bucket) + place.removeprefix(str(root)) for place in (path, images)]
    assert contents(open_source(*there)) == contents(open_source(path, images))
    report = check(open_source(*there))
    assert (report.seen, report.valid) == (12, 12)


def test_shards_are_packed_into_a_bucket_and_read_there(tmp_path, bucket, server, pdrop, fails, monkeypatch):
    path, images = formats.write(tmp_path, "json")
    local = open_source(path, images)
    whole = pack(local, tmp_path / "packed", records_per_shard=SIZE)
    out = bucket / "packed"

    upload(tmp_path / "packed", out)
    (out / "00001.arrayrecord").unlink()
    (out / "00002.arrayrecord").write_bytes(b"half")
    server.reset(share=0.05)
    result = pdrop("data", "pack", path, out, "--images", images, "--records-per-shard", SIZE, "--workers", 2)
    assert result.code == 0, result.stderr
    server.reset()
    here = {name: (tmp_path / "packed" / name).read_bytes() for name in files_below(tmp_path / "packed")}
    assert {name: (out / name).read_bytes() for name in files_below(out)} == here
    assert whole.records == 12

    if bucket.parts[1] == "s3":
        assert "are read from a local disk or gs:// only" in fails("data", "check", out)
        return
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.url)
    assert contents(open_source(str(out))) == contents(local)
    server.reset(share=0.05)
    assert contents(open_source(str(out))) == contents(local)
    assert server.failed
    server.reset()
    (out / "00001.arrayrecord").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 3 shards or has them in part, the first is 00001.arrayrecord"):
        open_source(str(out))


def test_a_bucket_that_is_not_there_is_found_before_a_picture_is_read(tmp_path, bucket, fails):
    path, images = formats.write(tmp_path, "json")
    missing = as_path(f"{bucket}-missing")
    assert fails("data", "pack", path, missing / "a", "--images", images).endswith(f"there is no bucket {missing}")
