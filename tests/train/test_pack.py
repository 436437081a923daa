"""Packing: the report of what is invalid, the same bytes after any interruption, and what it refuses to write."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time

import formats
import pytest
from command import PDROP
from mutations import NASTY, mutations, one_line

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.messages import Medium, Message
from pdrop_jax.train.data.examples import read_record
from pdrop_jax.train.data.invalid import EXAMPLES
from pdrop_jax.train.data.pack import check, pack
from pdrop_jax.train.data.sources.manifest import read_manifest
from pdrop_jax.train.data.sources.open_source import open_source
from pdrop_jax.train.data.sources.packed_source import pack_index, pack_record, record_text, unpack_index, unpack_record

SIZE = 4  # records for each shard


@pytest.fixture
def source(tmp_path):
    """Fourteen records, five of them invalid, and two with a picture that is cut short."""
    broken = [
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]},
        {"image": "0.png", "conversations": [{"from": "human", "value": "no tag"}, {"from": "gpt", "value": "a"}]},
        {
            "image": "absent.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
        },
        {"conversations": [{"from": "narrator", "value": "a"}]},
        "text",
    ]
    path, images = formats.write(tmp_path, "json", [*formats.records(5), *broken, *formats.records(4)])
    file = tmp_path / "images/1.png"
    file.write_bytes(file.read_bytes()[:60])
    return open_source(path, images)


INVALID = {
    "corrupt image": 2,
    "<image> tag without image": 1,
    "image without <image> tag": 1,
    "no image file": 1,
    "malformed conversation": 1,
    "malformed JSON": 1,
}


def contents(folder):
    """Hash of each file below a folder."""
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_report_counts_and_names_what_is_invalid(source, tmp_path):
    report = check(source)
    assert report.invalid == INVALID
    assert (report.seen, report.valid) == (14, 7)
    assert report.first == 2
    assert report.examples["no image file"] == [(8, "absent.png")]
    assert [number for number, _ in report.examples["corrupt image"]] == [2, 12]
    assert "1.png: cannot be read as a picture" in report.examples["corrupt image"][0][1]
    first, second, *_ = report.lines()
    assert first == "14 records, 7 valid, 7 invalid"
    assert second.split()[:3] == ["2", "corrupt", "image:"]
    manifest = pack(source, tmp_path / "packed", records_per_shard=SIZE)
    assert manifest.report == report
    again = check(open_source(str(tmp_path / "packed")))
    assert (again.seen, again.invalid) == (7, {})


def test_a_report_names_the_first_few(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' * 9)
    with pytest.raises(UserError, match=r"all 9 are invalid \(9 no conversations or messages\); row 1: its keys are a"):
        pack(open_source(str(tmp_path / "a.jsonl")), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    report = check(open_source(str(tmp_path / "a.jsonl")))
    assert [number for number, _ in report.examples["no conversations or messages"]] == list(range(1, EXAMPLES + 1))
    assert report.lines()[1].endswith(", …")


def test_packing_goes_on_with_what_is_missing(source, tmp_path):
    pack(source, tmp_path / "whole", records_per_shard=SIZE)
    expected = contents(tmp_path / "whole")
    assert list(expected) == [*(f"0000{n}.arrayrecord" for n in range(4)), "manifest.json"]
    manifest = json.loads((tmp_path / "whole/manifest.json").read_text())
    for kept in range(len(manifest["shards"]) + 1):
        part = tmp_path / f"part{kept}"
        shutil.copytree(tmp_path / "whole", part)
        begun = manifest | {"complete": False, "shards": manifest["shards"][:kept]}
        (part / "manifest.json").write_text(json.dumps(begun))
        for name in list(expected)[kept:-1]:
            (part / name).write_bytes(b"half")
        with pytest.raises(
            UserError, match="holds shards, but packing was not completed: run the same pdrop data pack"
        ):
            open_source(str(part))
        pack(source, part, records_per_shard=SIZE)
        assert contents(part) == expected


def test_a_complete_pack_is_left_alone_unless_a_shard_is_lost(source, tmp_path):
    out = tmp_path / "packed"
    pack(source, out, records_per_shard=SIZE)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    pack(source, out, records_per_shard=SIZE)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    expected = contents(out)
    lost = next(out.glob("*.arrayrecord"))
    lost.write_bytes(lost.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"lacks 1 of \d shards or has them in part, the first is {lost.name}"):
        open_source(str(out))
    pack(source, out, records_per_shard=SIZE)
    assert contents(out) == expected
    shutil.copy(lost, out / "another.arrayrecord")
    with pytest.raises(UserError, match=r"holds another.arrayrecord, which its manifest.json does not name: remove it"):
        open_source(str(out))


def test_what_is_not_packed_into(source, tmp_path):
    out = tmp_path / "packed"
    pack(source, out, records_per_shard=SIZE)
    other = open_source(*formats.write(tmp_path, "tar"))
    for refused, given, changes, message in (
        (out, other, {}, "holds shards of other data than"),
        (out, source, {"records_per_shard": 5}, r"was packed with another --records-per-shard \(4, now 5\)"),
        (out, source, {"outside_images": True}, r"was packed with another --outside-images \(False, now True\)"),
        (tmp_path / "images", source, {}, "exists and is not empty: choose another folder"),
        (tmp_path / "images/0.png", source, {}, "is a file, expected the name of a folder"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=message):
            pack(given, refused, **{"records_per_shard": SIZE, **changes})
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_source_that_is_damaged_in_the_middle(tmp_path):
    """The shards before the damage are there, none in part, and nobody takes them for all."""
    path, _ = formats.write(tmp_path, "tar")
    damaged = sorted((tmp_path / "tar").iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"00001.tar is damaged or was cut short"):
        pack(open_source(path), tmp_path / "packed", records_per_shard=3)
    assert list(contents(tmp_path / "packed")) == ["00000.arrayrecord", "00001.arrayrecord", "manifest.json"]
    with pytest.raises(UserError, match="packing was not completed"):
        open_source(str(tmp_path / "packed"))


def test_a_full_disk(source, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, limits[1]))  # a shard takes at least 128 KiB
    try:
        with pytest.raises(UserError, match=r"00000.arrayrecord cannot be written \(.*") as error:
            pack(source, tmp_path / "packed", records_per_shard=SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "packed").iterdir()) == []
    pack(source, tmp_path / "packed", records_per_shard=SIZE)


def test_no_value_of_a_manifest_does_more_than_a_line(source, tmp_path):
    out = tmp_path / "packed"
    pack(source, out, records_per_shard=SIZE)
    whole = json.loads((out / "manifest.json").read_text())
    refused = 0
    for path, value, changed in mutations(whole, [None, "x", -1, 1.5, 10**30, [], {}, NASTY[-1]]):
        (out / "manifest.json").write_text(json.dumps(changed))
        with one_line((path, value)) as said:
            open_source(str(out))
        refused += len(said)
    assert refused > 300


def test_messages_come_back_as_they_were():
    """Also places in the text, empty texts, pieces that would make a tag together, and a system message."""
    inline, own = Medium(inline=True), Medium()
    messages = [
        Message("system", ("Be brief.",)),
        Message("user", (own, "<im", "age> is ", inline, "?", own)),
        Message("assistant", ()),
        Message("user", (inline,)),
    ]
    text = record_text(messages, "r1")
    ((record, sizes),) = unpack_index(pack_index(((text, ((2, 3),) * 4),)), "it")
    assert record["id"] == "r1"
    assert sizes == ((2, 3),) * 4
    assert unpack_record(pack_record(text, [b"a", b"b", b"c", b"d"]), "it") == [b"a", b"b", b"c", b"d"]
    found, shown = read_record(record | {"images": list("abcd")}, str)
    assert found == messages
    assert shown == list("abcd")


def test_a_killed_pack_goes_on_with_the_same_bytes(tmp_path):
    """Worker processes end with the command, which is killed, and its shards have the bytes of one process."""
    path, images = formats.write(tmp_path, "jsonl", formats.records(60))
    source = open_source(path, images)
    pack(source, tmp_path / "whole", records_per_shard=1)
    command = [*PDROP, "data", "pack", path, str(tmp_path / "packed"), "--images", images]
    command += ["--records-per-shard", "1", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    manifest = tmp_path / "packed/manifest.json"
    while not manifest.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = read_manifest(tmp_path / "packed")
    assert not done.complete
    assert 0 < len(done.shards) < 60
    deadline = time.monotonic() + 30
    while _alive(process.pid):
        assert time.monotonic() < deadline, "worker processes are left"
        time.sleep(0.05)
    for left in (tmp_path / "packed").glob(".pdrop-unfinished-*"):
        left.unlink()  # the next day's command would
    pack(source, tmp_path / "packed", records_per_shard=1)
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
