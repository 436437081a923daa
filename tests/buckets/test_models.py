"""Models and answers in buckets: written whole or not at all, and checked when they are read."""

import json
import pathlib

import jax
import numpy as np
import pytest
import torch
from tiny_run import CONFIG, TOKENIZER

from pdrop_jax import checkpoint
from pdrop_jax.checkpoint.tensor_files import RemoteTensors
from pdrop_jax.convert.pickles import open_pickle
from pdrop_jax.errors import UserError
from pdrop_jax.eval.evaluate import evaluate
from pdrop_jax.eval.journal import Journal
from pdrop_jax.eval.shares import Share
from pdrop_jax.generation.pretrained import DEMO
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.io import UNFINISHED, check_output, put_in_place, write_file
from pdrop_jax.model.params import init_params
from pdrop_jax.paths import as_path, files_below, in_bucket
from pdrop_jax.schedule import DropSchedule

PICTURES = pathlib.Path(__file__).parents[2] / "examples" / "grids"


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, seed=1)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_out_and_back(pdrop, name):
    """Exported to a bucket, converted from there to one of the other kind, and asked about a picture in the first."""
    first, bucket = as_path(f"gs://{name}"), as_path(f"s3://{name}")
    assert pdrop("export", DEMO, first / "hf", "--format", "hf").stdout.startswith(f"{first}/hf: ")
    assert pdrop("convert", first / "hf", bucket / "model").stdout.startswith(f"{bucket}/model: ")
    dense = DropSchedule.none()
    found, expected = (checkpoint.load(folder, schedule=dense)[1] for folder in (bucket / "model", DEMO))
    equal(found["stages"], expected["stages"])
    (first / "0.png").upload(PICTURES / "0.png")
    ask = ("generate", "--prompt", "What is this?", "--max-new-tokens", 4, "--layers", "none")
    there = pdrop(*ask, "--model", bucket / "model", "--image", first / "0.png", "--picture", bucket / "kept.png")
    assert there.stdout.splitlines()[0] == pdrop(*ask, "--image", PICTURES / "0.png").stdout.splitlines()[0]
    assert (bucket / "kept.png").stat().st_size > 1000
    assert not [file for place in (first, bucket) for file in files_below(place) if "pdrop" in file]


def test_a_folder_is_complete_or_no_model(bucket, params):
    folder = bucket / "model"
    (folder / UNFINISHED).write_bytes(b"")  # as a killed process leaves it
    (folder / "params" / "0" / "left").write_bytes(b"1")
    with pytest.raises(UserError, match="has not been written completely: run the command that writes it again"):
        checkpoint.load(folder)
    checkpoint.save(folder, CONFIG, params, companions=TOKENIZER)
    equal(checkpoint.load(folder)[1], params)
    assert not {UNFINISHED, "params/0/left"} & files_below(folder).keys()
    with pytest.raises(UserError, match="model exists: remove it or choose another folder"):
        checkpoint.save(folder, CONFIG, params)
    with pytest.raises(UserError, match=f"{bucket} exists"):  # it has other things in it
        checkpoint.save(bucket, CONFIG, params)
    with pytest.raises(UserError, match="stop"):
        stop_half_way(bucket / "other")
    assert not (bucket / "other").exists()


def stop_half_way(folder):
    with checkpoint.new_folder(folder, 0) as new:
        (new / "a").write_bytes(b"1")
        raise UserError("stop")


@pytest.mark.parametrize(("single", "scheme"), [(False, "gs"), (True, "s3")], ids=["orbax", "safetensors"])
def test_damage_is_found(single, scheme, name, params):
    bucket = as_path(f"{scheme}://{name}")
    checkpoint.save(bucket / "model", CONFIG, params, single_file=single)
    equal(checkpoint.load(bucket / "model")[1], params)
    sizes = {name: size for name, size in files_below(bucket / "model").items() if name.startswith("params")}
    largest = bucket / "model" / max(sizes, key=sizes.__getitem__)
    content = largest.read_bytes()
    middle = len(content) // 2
    largest.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError, match=r"is damaged: the checksum|cannot be read"):
        checkpoint.load(bucket / "model")
    largest.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"is damaged: (1 of|it has)"):
        checkpoint.load(bucket / "model")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "its header would have 0 bytes"),
        (b"\xff" * 8, "its header would have 18,446,744,073,709,551,615 bytes"),
        (b"\x02\0\0\0\0\0\0\0[]", "its header is a list"),
        (b"\x03\0\0\0\0\0\0\0{]}", "the header of .* is malformed"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "its tensors end at"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "x.shape.0 is -1"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 0]}}, "is damaged"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"x \[2\] has 4 bytes"),
    ],
)
def test_headers_that_are_none(content, says, name):
    if isinstance(content, dict):
        header = json.dumps(content).encode()
        content = len(header).to_bytes(8, "little") + header + b"1234"
    path = as_path(f"gs://{name}/x.safetensors")
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        RemoteTensors(path).get_tensor("x")


def test_answers(name, tmp_path, params):
    """A run that was killed after three answers is finished, and another is shared by two; as a local run's output."""
    bucket = as_path(f"gs://{name}")
    checkpoint.save(tmp_path / "model", CONFIG, params, companions=TOKENIZER)
    for path in PICTURES.glob("*.png"):
        (bucket / "pictures" / path.name).upload(path)
    lines = (PICTURES / "questions.jsonl").read_text().splitlines(keepends=True)[:6]
    for folder in (bucket, tmp_path):
        (folder / "q.jsonl").write_text("".join(lines))

    def run(place, pictures, name="a.jsonl", share=Share()):
        settings = {"batch_size": 2, "sampling": Sampling(2), "share": share}
        return evaluate(tmp_path / "model", place / "q.jsonl", pictures, place / name, **settings)

    run(tmp_path, PICTURES)
    expected = (tmp_path / "a.jsonl").read_bytes()
    with Journal(bucket / "a.jsonl") as journal:
        journal.append(map(json.loads, expected.splitlines()[:3]))
        late = Journal(bucket / "a.jsonl")
        with late:
            journal.append(map(json.loads, expected.splitlines()[:1]))
            with pytest.raises(UserError, match="is being written by another process"):
                late.append(map(json.loads, expected.splitlines()[:1]))
    assert run(bucket, bucket / "pictures").answered == 3
    assert (bucket / "a.jsonl").read_bytes() == expected
    assert run(bucket, bucket / "pictures").answered == 0
    first = run(bucket, bucket / "pictures", "b.jsonl", Share(1, 2))
    assert (first.answered, first.missing) == (2, 4)
    assert run(bucket, bucket / "pictures", "b.jsonl", Share(0, 2)).answered == 4
    assert (bucket / "b.jsonl").read_bytes() == expected
    assert {name for name in files_below(bucket) if "pictures" not in name} == {"a.jsonl", "b.jsonl", "q.jsonl"}


def test_files_are_not_replaced_unasked(bucket, tmp_path):
    path = bucket / "folder" / "a.json"
    write_file(path, "1")
    with pytest.raises(UserError, match=r"a\.json exists: choose another name, or replace the file with --overwrite"):
        write_file(path, "2")
    with pytest.raises(UserError, match="is read by this command"):
        check_output(path, overwrite=True, inputs=[bucket / "folder"])
    with pytest.raises(UserError, match="is a folder"):
        check_output(bucket / "folder", overwrite=True)
    write_file(path, "3", overwrite=True)
    (tmp_path / "late").write_text("4")
    with pytest.raises(UserError, match="was created by another program in the meantime: the output is in") as caught:
        put_in_place(tmp_path / "late", path, overwrite=False)
    assert (path.read_text(), as_path(str(caught.value).split()[-1]).read_text()) == ("3", "4")


def test_what_needs_a_local_disk_says_so(name, fails):
    hub = fails("export", DEMO, f"gs://{name}/hf", "--format", "hf", "--push-to-hub", "me/model")
    assert "--push-to-hub uploads a local folder" in hub


def test_paths():
    assert str(as_path("gs://bucket/a/../b/")) == "gs://bucket/b"
    assert str(as_path(pathlib.Path("s3://bucket/a"))) == "s3://bucket/a"  # pathlib makes s3:/bucket/a of it
    assert as_path("gs://bucket/a").parent / "b" == as_path("gs://bucket/b")
    assert as_path("/tmp/gs:/bucket") == pathlib.Path("/tmp/gs:/bucket")
    assert not in_bucket("/tmp/gs:/bucket")
    assert isinstance(as_path("gs"), pathlib.Path)
    with pytest.raises(UserError, match="gs:// names no bucket: write gs://BUCKET/NAME"):
        as_path("gs://")


def test_pickles_are_copied_to_be_read(name, tmp_path):
    torch.save({"weight": torch.arange(6.0).reshape(2, 3)}, tmp_path / "mm_projector.bin")
    path = as_path(f"gs://{name}/mm_projector.bin")
    path.upload(tmp_path / "mm_projector.bin")
    np.testing.assert_array_equal(open_pickle(path)["weight"].read(), np.arange(6.0).reshape(2, 3))
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"{path} (is refused|cannot be read)"):
        open_pickle(path)
