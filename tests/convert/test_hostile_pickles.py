"""Files of torch.save that are damaged or hostile: one line, and no memory taken for what they say that they hold."""

import os
import random
import zipfile

import numpy as np
import pytest
import torch
from mutations import one_line

from pdrop_jax.convert.pickles import open_pickle
from pdrop_jax.errors import UserError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c.weight": torch.nn.Parameter(torch.zeros(2, 2)),
}


def saved(path, data, legacy=False):
    torch.save(data, path, _use_new_zipfile_serialization=not legacy)
    return path


class Call:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
def test_good_files_are_read(legacy, tmp_path):
    found = open_pickle(saved(tmp_path / "x.bin", TENSORS, legacy))
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        "a.weight": ((3, 4), "float32"),
        "b.weight": ((5,), "bfloat16"),
        "c.weight": ((2, 2), "float32"),
    }
    np.testing.assert_array_equal(found["a.weight"].read(), TENSORS["a.weight"].numpy())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({5: torch.zeros(2)}, "does not contain a dictionary of tensors"),
        ({None: torch.zeros(2)}, "does not contain a dictionary of tensors"),
        ([torch.zeros(2)], "does not contain a dictionary of tensors"),
        ({"a": 5}, "does not contain a dictionary of tensors: a is a int"),
        ({"a": {"b": torch.zeros(2)}}, "does not contain a dictionary of tensors: a is a dict"),
        ({"a": torch.eye(2).to_sparse()}, "is refused: .* it names torch"),
        ({"a": torch.eye(2).to_sparse_csr()}, "is refused: .* it names torch"),
        ({"a": torch.zeros(2, device="meta")}, "is refused: .* it names torch"),
        ({"a": Call(bytearray, 10**11)}, "is refused: .* it names .*bytearray"),
        ({"a": Call(os.mkdir, "it ran")}, "is refused: .* it names .*mkdir"),
        ({"a": Call(eval, "1")}, "is refused: .* it names .*eval"),
    ],
)
def test_what_is_no_dictionary_of_dense_tensors(data, message, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_pickle(saved(tmp_path / "x.bin", data, legacy))
    assert not (tmp_path / "it ran").exists()


def test_dtypes_that_no_checkpoint_of_ours_has_are_left_to_the_conversion_to_refuse(tmp_path):
    data = {"a": torch.zeros(2, dtype=torch.float8_e4m3fn), "b": torch.zeros(2, dtype=torch.int64)}
    found = open_pickle(saved(tmp_path / "x.bin", data))
    assert [x.dtype for x in found.values()] == ["float8_e4m3fn", "int64"]


def test_a_small_zip_that_expands_is_refused_before_it_is_unpacked(tmp_path):
    saved(tmp_path / "good.bin", TENSORS)
    with zipfile.ZipFile(tmp_path / "good.bin") as good, zipfile.ZipFile(tmp_path / "x.bin", "w") as bomb:
        for member in good.infolist():
            with bomb.open(zipfile.ZipInfo(member.filename), "w") as file:
                file.write(good.read(member))
        info = zipfile.ZipInfo("good/data/9")
        info.compress_type = zipfile.ZIP_DEFLATED
        with bomb.open(info, "w") as file:
            for _ in range(64):
                file.write(bytes(2**20))
    assert (tmp_path / "x.bin").stat().st_size < 2**20
    with pytest.raises(UserError, match=r"x.bin is refused: its [\d,]+ bytes unpack to 67,1"):
        open_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize("legacy", [False, True])
def test_sizes_beyond_the_file_take_no_memory(legacy, tmp_path):
    """The counts of elements that a pickle names are raised to 3 billion, which would be 12 GB."""
    path = saved(tmp_path / "x.bin", {"a": torch.zeros(77_777)}, legacy)
    data = path.read_bytes()
    count, huge = b"J" + (77_777).to_bytes(4, "little"), b"\x8a\x08" + (3 * 10**9).to_bytes(8, "little")
    assert count in data
    if legacy:
        path.write_bytes(data.replace(count, huge))
    else:
        with zipfile.ZipFile(path) as good, zipfile.ZipFile(tmp_path / "y.bin", "w") as bad:
            for member in good.infolist():
                bad.writestr(member.filename, good.read(member).replace(count, huge))
        path = tmp_path / "y.bin"
    with pytest.raises(UserError, match=r"it names 3,000,000,000 elements, but has [\d,]+ bytes"):
        open_pickle(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files(legacy, tmp_path):
    """Flipped bytes, cuts and runs of zeros anywhere: a line, or tensors of the shapes that the file says."""
    data = saved(tmp_path / "good.bin", TENSORS, legacy).read_bytes()
    rng, path, refused = random.Random(0), tmp_path / "x.bin", 0
    for number in range(300):
        changed = bytearray(data)
        at = rng.randrange(len(data))
        if number % 3 == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif number % 3 == 1:
            changed[at] = rng.randrange(256)
        else:
            del changed[at:]
        path.write_bytes(changed)
        with one_line((number, at)) as said:
            for x in open_pickle(path).values():
                assert x.read().shape == x.shape
        refused += len(said)
    assert refused > 90
