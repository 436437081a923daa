"""``pdrop data``: what it prints, its exit codes, and mistakes."""

import json

import pytest
from PIL import Image


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data set of three records, the last one invalid, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images/a.png")
    said = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A square."}]
    records = [{"messages": said, "images": [name]} for name in ("a.png", "a.png", "b\x1b.png")]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def test_check_and_pack(pdrop, data):
    line = "        1  no image file: record 3 (b\\u001b.png)"
    report = f"3 records, 2 valid, 1 invalid\n  {line}\n"
    options = ("--images", "images", "--workers", 1)
    found = pdrop("data", "check", "data.json", *options)
    assert (found.code, found.stdout, found.stderr) == (1, report, "")
    found = pdrop("data", "pack", "data.json", "packed", *options)
    assert (found.code, found.stderr) == (0, "")
    assert found.stdout == report + "packed: 2 records, 2 pictures, 1 shard, 0.1 MB\n"
    found = pdrop("data", "check", "packed", "--workers", 1)
    assert (found.code, found.stdout) == (0, "2 records, 2 valid, 0 invalid\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("pack", "data.json"), "Missing OUT. Usage: pdrop data pack SOURCE OUT"),
        (("check", "data.json", "out"), "check writes nothing, so out has no use"),
        (("check", "absent.json"), "absent.json cannot be read: there is no such file"),
        (("check", "data.json", "--images", "absent"), "absent, which is not a folder"),
        (("check", "data.json", "--workers", 0), "--workers is 0, it must be in 1..256"),
        (("pack", "data.json", "out", "--records-per-shard", 0), "--records-per-shard is 0, it must be in 1.."),
        (("pack", "data.json", "images/a.png", "--images", "images"), "is a file, expected the name of a folder"),
        (("unpack", "data.json"), "see pdrop data --help"),
    ],
)
def test_mistakes(fails, data, args, message):
    line = fails("data", *args)
    assert line.startswith("pdrop data: ")
    assert message in line


def test_a_mistyped_preset_lists_the_presets(fails, data):
    assert fails("train", "llava-1.5-fintune") == (
        "pdrop train: llava-1.5-fintune is neither a preset nor a file: the presets are llava-1.5-finetune, "
        "llava-1.5-pretrain, llava-next-finetune, llava-next-pretrain, llava-uhd-v4-stage1, llava-uhd-v4-stage2, "
        "llava-uhd-v4-stage3, llava-uhd-v4-stage4, standby-stage1, standby-stage2"
    )
