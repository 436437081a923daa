"""Checkpoints with damaged files: each is refused in a line, or it loads with the arrays that were written."""

import os
import random

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_checkpoint import CONFIG, random_params

from pdrop_jax import checkpoint
from pdrop_jax.checkpoint import storage
from pdrop_jax.errors import UserError

PAGE = 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Both containers of one model, and the bytes of its arrays."""
    folder, params = tmp_path_factory.mktemp("whole"), random_params(CONFIG)
    checkpoint.save(folder / "folder", CONFIG, params)
    checkpoint.save(folder / "single", CONFIG, params, single_file=True)
    return folder, contents(params)


def contents(params):
    return {name: np.asarray(x).tobytes() for name, x in flatten_dict(params, sep=".").items()}


def flipped(data, place, bit):
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def zeroed(data, place, size=PAGE):
    return data[:place] + bytes(len(data[place : place + size])) + data[place + size :]


def outcome(file, data, load):
    """What ``load`` says with ``data`` in ``file``: the line of its error, or its arrays' bytes."""
    before = file.read_bytes()
    try:
        file.write_bytes(data)
        return contents(load())
    except UserError as error:
        return str(error)
    finally:
        file.write_bytes(before)


def check(found, expected, where):
    """True if it was refused."""
    if isinstance(found, dict):
        assert found == expected, where
        return False
    assert "\n" not in found, where
    return True


@pytest.mark.parametrize("container", ["folder", "single"])
def test_every_damaged_page_of_the_arrays_is_refused(container, whole):
    folder, expected = whole
    files = [path for path in (folder / container).rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert files
    for file in files:
        data = file.read_bytes()
        for place in range(0, len(data) - PAGE, len(data) // 12):
            assert check(
                outcome(file, zeroed(data, place), lambda: checkpoint.load(folder / container)[1]), expected, place
            )


@pytest.mark.parametrize("container", ["folder", "single"])
def test_every_flipped_bit_is_refused_or_harmless(container, whole):
    folder, expected = whole
    rng = random.Random(0)
    refused = 0
    for file in sorted(path for path in (folder / container).rglob("*") if path.is_file() and path.stat().st_size):
        if file.name == "config.json":
            continue
        data = file.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if container == "single" else len(data)
        for place in [rng.randrange(header) for _ in range(24 if container == "single" else 2)]:
            bit = rng.randrange(8)
            found = outcome(file, flipped(data, place, bit), lambda: checkpoint.load(folder / container)[1])
            refused += check(found, expected, f"bit {bit} of byte {place} of {file}")
    assert refused >= 10


def test_files_of_the_container_that_are_gone_or_cut_short(whole):
    folder, expected = whole
    for name in ("sizes.json", "checksums.json"):
        file = folder / "folder" / name
        for left in (0, 1, -3):
            found = outcome(file, file.read_bytes()[:left], lambda: checkpoint.load(folder / "folder")[1])
            assert check(found, expected, name)
            assert name in found


def test_a_checkpoint_without_checksums_is_loaded_with_a_note(whole, tmp_path, capfd):
    """As the first release wrote it."""
    folder, expected = whole
    (tmp_path / "old").symlink_to(folder / "folder")
    checksums = folder / "folder/checksums.json"
    content = checksums.read_bytes()
    checksums.unlink()
    try:
        found = [checkpoint.load(tmp_path / "old")[1] for _ in range(2)]
    finally:
        checksums.write_bytes(content)
    assert [contents(params) for params in found] == [expected] * 2
    note = f"note: {tmp_path / 'old'} was written without checksums, so damage to its arrays cannot be detected; "
    assert capfd.readouterr().err.startswith(note)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("container", ["folder", "single"])
def test_what_is_damaged_can_be_loaded_without_verifying(container, whole):
    folder, expected = whole
    file = max((folder / container).rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data = file.read_bytes()
    damaged = zeroed(data, len(data) // 2)
    assert check(outcome(file, damaged, lambda: checkpoint.load(folder / container)[1]), expected, "verified")
    found = outcome(file, damaged, lambda: checkpoint.load(folder / container, verify=False)[1])
    assert found.keys() == expected.keys()
    assert found != expected


@pytest.mark.parametrize("options", [{"dtype": jax.numpy.bfloat16}, {"quantize": "int8"}], ids=["cast", "quantized"])
def test_what_is_stored_is_verified_whatever_is_made_of_it(options, whole):
    folder, expected = whole
    file = folder / "single/params.safetensors"
    damaged = flipped(file.read_bytes(), file.stat().st_size - 4, 0)  # of a float32's last bit bfloat16 knows nothing
    found = outcome(file, damaged, lambda: checkpoint.load(folder / "single", **options)[1])
    assert check(found, expected, options)


def test_another_array_of_the_file_is_not_taken_for_a_missing_one(whole):
    folder, _ = whole
    file = folder / "folder/checksums.json"
    changed = file.read_bytes().replace(b'"norm.scale"', b'"norm.skale"')
    found = outcome(file, changed, lambda: checkpoint.load(folder / "folder")[1])
    assert found == f"{folder / 'folder'} is damaged: array norm.scale has no checksum; copy or convert it again"


def test_unused_tensors_are_verified(tmp_path):
    file = tmp_path / "unused.safetensors"
    storage.write_safetensors(file, {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float16)})
    data = file.read_bytes()
    expected = contents(storage.read_safetensors(file))
    assert expected["a"] == np.arange(6, dtype=np.float32).tobytes()
    rng = random.Random(0)
    damaged = [data[:left] for left in (0, 7, 50, -1)]
    damaged += [flipped(data, place, rng.randrange(8)) for place in range(len(data))]
    refused = 0
    for content in damaged:
        found = outcome(file, content, lambda: storage.read_safetensors(file))
        refused += check(found, expected, content)
        assert isinstance(found, dict) or "unused.safetensors" in found
    # What is left are the names in the metadata, without which the file is one of the first release.
    assert len(damaged) - refused <= len('"format":"pt","checksums.json":')


@pytest.mark.parametrize("name", ["params.safetensors", "arrays.json", "sizes.json", "checksums.json", "config.json"])
def test_a_fifo_is_not_waited_for(name, whole, tmp_path):
    folder, _ = whole
    source = folder / ("single" if name == "params.safetensors" else "folder")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in source.iterdir():
        if path.name != name:
            (copy / path.name).symlink_to(path)
    os.mkfifo(copy / name)
    with pytest.raises(UserError, match=f"{name} is a FIFO, expected a file"):
        checkpoint.load(copy)
