"""Checkpoints: saved and loaded whole, moved between schedules, damaged ones refused."""

import dataclasses
import json
import os
import resource
import shutil
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from pdrop_jax import checkpoint
from pdrop_jax.checkpoint import storage
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.lora import add_lora, merge_lora
from pdrop_jax.model.params import abstract_params
from pdrop_jax.model.quantization import quantize_decoder
from pdrop_jax.model.stacking import restage
from pdrop_jax.schedule import DropSchedule

CONFIG = LlavaConfig(
    vision=VisionConfig(28, 14, 32, 64, 3, 4),
    text=TextConfig(99, 32, 48, 6, 4, 2, 16),
    schedule=DropSchedule((2, 4), (0.5, 0.25)),
)
SCHEDULES = [
    DropSchedule.none(),
    DropSchedule((2, 4), (0.5, 0.25)),
    DropSchedule((0,), (0.3,)),
    DropSchedule((0, 4, 5), (0.5, 0.2, 0.0)),
    DropSchedule((3,), (0.5,), "original"),
]


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.leaves(jax.tree.map(lambda x: (x.shape, x.dtype), found)) == jax.tree.leaves(
        jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    )


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), abstract_params(config))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture
def saved(params, tmp_path):
    checkpoint.save(tmp_path / "saved", CONFIG, params)
    return tmp_path / "saved"


@pytest.fixture
def single(params, tmp_path):
    checkpoint.save(tmp_path / "single", CONFIG, params, single_file=True)
    return tmp_path / "single"


CONTAINERS = pytest.mark.parametrize("single_file", [False, True], ids=["folder", "single file"])


@CONTAINERS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_saved_is_loaded(dtype, single_file, params, tmp_path):
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    checkpoint.save(tmp_path / "out", CONFIG, params, single_file=single_file)
    config, loaded = checkpoint.load(tmp_path / "out")
    assert config == CONFIG
    assert_equal(loaded, params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))


def test_numpy_arrays_can_be_saved(params, tmp_path):
    checkpoint.save(tmp_path / "out", CONFIG, jax.tree.map(np.asarray, params))
    assert_equal(checkpoint.load(tmp_path / "out")[1], params)


@CONTAINERS
@pytest.mark.parametrize("old", SCHEDULES)
@pytest.mark.parametrize("new", SCHEDULES)
def test_another_schedule_moves_the_stage_boundaries(old, new, single_file, params, tmp_path):
    config = dataclasses.replace(CONFIG, schedule=old)
    checkpoint.save(tmp_path / "out", config, restage(params, CONFIG, old), single_file=single_file)
    moved, loaded = checkpoint.load(tmp_path / "out", schedule=new)
    assert moved == dataclasses.replace(CONFIG, schedule=new)
    assert_equal(loaded, restage(params, CONFIG, new))
    shapes = jax.tree.map(lambda x: x.shape, abstract_params(moved))
    assert jax.tree.map(lambda x: x.shape, loaded) == shapes


@CONTAINERS
def test_the_dtype_may_be_chosen(single_file, params, tmp_path):
    checkpoint.save(tmp_path / "saved", CONFIG, params, single_file=single_file)
    _, loaded = checkpoint.load(tmp_path / "saved", schedule=DropSchedule((0,), (0.5,)), dtype=jnp.bfloat16)
    expected = restage(params, CONFIG, DropSchedule((0,), (0.5,)))
    assert_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected))


def test_a_tied_model_has_no_head(tmp_path):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, tie_embeddings=True))
    params = random_params(config)
    checkpoint.save(tmp_path / "out", config, params)
    assert "head" not in params
    assert_equal(checkpoint.load(tmp_path / "out")[1], params)


def test_a_single_file_holds_the_arrays_under_our_names(single, params):
    assert {path.name for path in single.iterdir()} == {"config.json", "params.safetensors"}
    found = load_file(single / "params.safetensors")
    assert found.keys() == flatten_dict(params, sep=".").keys()
    np.testing.assert_array_equal(found["stages.1.mlp.up.kernel"], params["stages"]["1"]["mlp"]["up"]["kernel"])


@CONTAINERS
def test_adapters_are_not_saved(single_file, params, tmp_path):
    adapted = add_lora(params, CONFIG, 4, 8)
    with pytest.raises(UserError, match="carry LoRA adapters, which a checkpoint cannot hold: call merge_lora first"):
        checkpoint.save(tmp_path / "out", CONFIG, adapted, single_file=single_file)
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path / "out", CONFIG, merge_lora(adapted), single_file=single_file)
    assert_equal(checkpoint.load(tmp_path / "out")[1], params)


def test_companions_travel_along(saved, params, tmp_path):
    names = ("tokenizer.json", "preprocessor_config.json", "unused.safetensors", "notes.txt")
    for name in names:
        (saved / name).write_text(name)
    checkpoint.save(tmp_path / "out", CONFIG, params, companions=saved)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "params", "arrays.json", "sizes.json", "checksums.json", *names} - {"notes.txt"}


def linked(folder, name, target):
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"of {name}")
    (folder / name).symlink_to(os.path.relpath(target, folder))


def test_links_are_followed_within_a_folder_and_in_a_hub_cache(tmp_path):
    cache = tmp_path / "models--llava-hf--llava-1.5-7b-hf"
    snapshot = cache / "snapshots/8c85e9a4d626"
    linked(snapshot, "tokenizer.json", cache / "blobs/1fe3")
    linked(snapshot, "tokenizer_config.json", snapshot / "files/tokenizer_config.json")
    (tmp_path / "out").mkdir()
    checkpoint.copy_files(snapshot, tmp_path / "out", checkpoint.COMPANIONS)
    found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if not path.is_symlink()}
    assert found == {name: f"of {name}" for name in ("tokenizer.json", "tokenizer_config.json")}


@pytest.mark.parametrize(
    ("folder", "target"),
    [
        ("model", "secret"),
        ("model", "blobs/1fe3"),
        ("models--a/snapshots/1", "secret"),
        ("models--a/snapshots/1", "models--b/blobs/1fe3"),
        ("models--a/snapshots/1", "models--a/snapshots/2/tokenizer.json"),
    ],
)
def test_what_a_link_out_of_the_folder_points_to_is_not_copied(folder, target, params, tmp_path):
    linked(tmp_path / folder, "tokenizer.json", tmp_path / target)
    with pytest.raises(UserError, match=r"tokenizer\.json is a link to .*, outside of its folder: replace it"):
        checkpoint.save(tmp_path / "out", CONFIG, params, companions=tmp_path / folder)
    assert not list(tmp_path.glob("out*"))


def test_a_link_to_a_link_is_judged_by_where_it_ends(params, tmp_path):
    linked(tmp_path / "models--a/blobs", "1fe3", tmp_path / "secret")
    (tmp_path / "models--a/snapshots/1").mkdir(parents=True)
    (tmp_path / "models--a/snapshots/1/tokenizer.json").symlink_to("../../blobs/1fe3")
    with pytest.raises(UserError, match=r"is a link to .*/secret"):
        checkpoint.save(tmp_path / "out", CONFIG, params, companions=tmp_path / "models--a/snapshots/1")


def test_a_link_to_itself_is_not_copied(params, saved, tmp_path):
    (saved / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read: Too many levels of symbolic links"):
        checkpoint.save(tmp_path / "out", CONFIG, params, companions=saved)


def test_a_fifo_is_not_copied(params, saved, tmp_path):
    os.mkfifo(saved / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is a FIFO, expected a file"):
        checkpoint.save(tmp_path / "out", CONFIG, params, companions=saved)


def test_an_existing_folder_is_kept(saved, params):
    with pytest.raises(UserError, match="saved exists: remove it or choose another folder"):
        checkpoint.save(saved, CONFIG, params)
    assert_equal(checkpoint.load(saved)[1], params)


def test_parameters_of_another_config_are_not_saved(params, tmp_path):
    text = dataclasses.replace(CONFIG.text, qkv_bias=True, vocab_size=100)
    with pytest.raises(UserError, match="9 missing, 0 unexpected, 2 of another shape") as caught:
        checkpoint.save(tmp_path / "out", dataclasses.replace(CONFIG, text=text), params)
    assert "missing: stages.2.attention.v.bias [2, 2, 16]" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_space_is_told_beforehand(params, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(UserError, match=r"out needs 0\.4 MB, but the disk has 0\.1 MB free"):
        checkpoint.save(tmp_path / "out", CONFIG, params)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing(params, tmp_path, monkeypatch):
    def full(*_args):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand details")

    monkeypatch.setattr(ocp, "save", full)
    with pytest.raises(OSError, match=r"No space left on device$"):
        checkpoint.save(tmp_path / "out", CONFIG, params)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_of_a_single_file(params, tmp_path):
    def save():
        # A limit on the size of files stands in for the disk: the system refuses the write in the same place.
        resource.setrlimit(resource.RLIMIT_FSIZE, (40000, limits[1]))
        try:
            checkpoint.save(tmp_path / "out", CONFIG, params, single_file=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match=r"out\.unfinished cannot be written: File too large"):
        save()
    assert not list(tmp_path.iterdir())


def test_each_array_is_gone_when_the_next_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "GROUP_BYTES", 1)
    last = []

    def array(n):
        assert not any(reference() is not None for reference in last)
        x = np.full((2, 3), n, np.float32)
        last[:] = [weakref.ref(x)]
        return x

    storage.write(tmp_path, ((f"stages.{n}.scale", array(n)) for n in range(4)))
    found = [ocp.load(tmp_path / "params" / str(n)) for n in range(4)]
    assert [x["stages"][str(n)]["scale"][0, 0] for n, x in enumerate(found)] == [0, 1, 2, 3]
    assert list(storage.stored(tmp_path)) == [f"stages.{n}.scale" for n in range(4)]


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"is not a checkpoint: it has no config\.json"):
        checkpoint.load(tmp_path)
    CONFIG.save(tmp_path)
    with pytest.raises(UserError, match=r"holds no arrays, neither params/ nor params\.safetensors"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("pattern", ["manifest.ocdbt", "_METADATA", "d/*"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut short"])
def test_damaged_files_are_named(damage, pattern, saved):
    file = next(path for path in (saved / "params" / "0" / "state").glob(pattern) if path.is_file())
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -1])
    message = (
        f"is damaged: 1 of [0-9]+ files are missing or have a different size, the first is {file.relative_to(saved)}"
    )
    with pytest.raises(UserError, match=message):
        checkpoint.load(saved)


def test_what_orbax_cannot_read_is_one_line(saved, capfd):
    metadata = saved / "params" / "0" / "state" / "_METADATA"
    metadata.write_bytes(b"x" * metadata.stat().st_size)
    with pytest.raises(
        UserError, match=r"the arrays in .* cannot be read \(.*\): convert the checkpoint again"
    ) as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_damaged_single_file(left, single):
    file = single / "params.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(
        UserError, match=r"the arrays in .* cannot be read \(.*\): convert the checkpoint again or restore a copy"
    ) as caught:
        checkpoint.load(single)
    assert "\n" not in str(caught.value)


def test_a_single_file_that_is_gone(single):
    (single / "params.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no arrays, neither params/ nor params\.safetensors"):
        checkpoint.load(single)


@CONTAINERS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 100}, r"wrong shape: embed.embedding is \[99, 32\], expected \[100, 32\]"),
        ({"tie_embeddings": True}, r"1 unexpected.*\n  unexpected: head.kernel"),
        ({"qkv_bias": True}, "missing: stages.0.attention.q.bias"),
    ],
)
def test_a_config_of_another_model(change, message, single_file, params, tmp_path):
    saved = tmp_path / "saved"
    checkpoint.save(saved, CONFIG, params, single_file=single_file)
    data = json.loads((saved / "config.json").read_text())
    data["text"] |= change
    (saved / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        checkpoint.load(saved)


@pytest.mark.parametrize("change", [{"text": {}}, {"color": "blue"}, {"schedule": {"layers": [1]}}])
def test_a_damaged_config(change, saved):
    data = json.loads((saved / "config.json").read_text()) | change
    (saved / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"config\.json is damaged, copy or convert it again"):
        checkpoint.load(saved)


def test_a_schedule_that_does_not_fit(saved):
    with pytest.raises(UserError, match="drop after layer 6 in a decoder of 6 layers"):
        checkpoint.load(saved, schedule=DropSchedule((6,), (0.5,)))


@pytest.mark.parametrize("schedule", [None, DropSchedule((3,), (0.5,))], ids=["own", "moved"])
def test_loaded_in_int8(schedule, saved, params):
    config, found = checkpoint.load(saved, schedule=schedule, quantize="int8")
    assert_equal(found, quantize_decoder(config, restage(params, CONFIG, config.schedule)))


def test_what_cannot_be_quantized(saved, params, tmp_path):
    with pytest.raises(UserError, match="cannot be quantized to 'int2': choose one of int8, int4, w8a8, w4a8, w4a4"):
        checkpoint.load(saved, quantize="int2")
    with pytest.raises(UserError, match="caches cannot be quantized to 'w8a8': choose int8 or int4"):
        checkpoint.load(saved, quantize_cache="w8a8")
    with pytest.raises(UserError, match="are quantized, which a checkpoint cannot hold"):
        checkpoint.save(tmp_path / "int8", CONFIG, quantize_decoder(CONFIG, params))


def test_arrays_of_the_first_release_are_all_in_one_place(params, tmp_path):
    checkpoint.save(tmp_path / "new", CONFIG, params)
    shutil.copytree(tmp_path / "new" / "params" / "0", tmp_path / "old" / "params")
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "old")
    sizes = json.loads((tmp_path / "new" / "sizes.json").read_text())
    (tmp_path / "old" / "sizes.json").write_text(json.dumps({k.replace("/0/", "/", 1): v for k, v in sizes.items()}))
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(tmp_path / "old")[1], params)
