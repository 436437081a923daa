"""PyTorch checkpoints that are used as they are: converted once, kept for every process, listed and removed."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from command import PDROP
from tiny_run import recipe_in, write_data

import pdrop_jax
from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert import cache
from pdrop_jax.convert.cache import model_folder
from pdrop_jax.convert.importer import convert

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOKENIZER = pathlib.Path(__file__).parents[2] / "examples" / "tiny_tokenizer"
PHOTO = GOLDEN / "img_astronaut_square_small.png"
ASK = ("--image", PHOTO, "--prompt", "Hi", "--max-new-tokens", 2, "--json")


@pytest.fixture
def local(tmp_path, hub):
    """The folder of a PyTorch checkpoint, with its tower beside it."""
    shutil.copytree(GOLDEN / "clip_tower", tmp_path / "clip_tower")
    folder = pathlib.Path(shutil.copytree(GOLDEN / "model_gqa", tmp_path / "local"))
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return folder


def test_generate_converts_once_and_takes_any_schedule(hub, tiny, pdrop, tmp_path):
    first = pdrop("generate", "--model", "lab/tiny", *ASK)
    assert first.code == 0, first
    (line,) = first.stderr.splitlines()
    kept = tmp_path / "converted" / "models-1" / f"{tiny.refs['main'][:16]}-float32" / "tiny"
    assert line == (
        f"lab/tiny: converting to float32 for this and later uses, into {kept} (pdrop cache clear removes it)"
    )
    convert(hub_snapshot(tiny), tmp_path / "ours", vision=GOLDEN / "clip_tower")
    ours = json.loads(pdrop("generate", "--model", tmp_path / "ours", *ASK).stdout)
    assert json.loads(first.stdout)["token_ids"] == ours["token_ids"]
    downloads = hub.downloads()
    again = pdrop("generate", "--model", "lab/tiny", *ASK, "--layers", 2, "--ratios", 0.5)
    assert (again.code, again.stderr) == (0, "")
    assert len(json.loads(again.stdout)["kept"]) == 1
    assert hub.downloads() == downloads


def hub_snapshot(repo):
    cached = pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE)
    return cached / "models--lab--tiny" / "snapshots" / repo.refs["main"]


def test_every_command_takes_an_id(hub, tiny, pdrop, fails, tmp_path):
    questions = tmp_path / "questions.jsonl"
    lines = [json.dumps({"question_id": n, "text": "Who?", "image": PHOTO.name}) + "\n" for n in range(2)]
    questions.write_text("".join(lines))
    answers = tmp_path / "answers.jsonl"
    named = ("--model", "lab/tiny")
    asked = ("--questions", questions, "--images", GOLDEN)
    assert pdrop("eval", *named, *asked, "--out", answers, "--max-new-tokens", 2).code == 0
    assert json.loads(answers.read_text().splitlines()[0])["model_id"] == "tiny"
    assert "the schedule drops nothing" in fails("study", *named, *asked)  # which is found after loading
    assert pdrop("cost", *named).code == 0
    assert pdrop("export", "lab/tiny", tmp_path / "back", "--format", "original").code == 0
    assert len(list(cache.root().glob("*-*"))) == 1


def test_training_starts_from_an_id(hub, tiny, pdrop, tmp_path):
    write_data(tmp_path / "data")
    recipe = dataclasses.asdict(recipe_in(tmp_path, model_start="lab/tiny", run_steps=1, data_text_buckets=(128,)))
    (tmp_path / "recipe.json").write_text(json.dumps({name: part for name, part in recipe.items() if part}))
    result = pdrop("train", tmp_path / "recipe.json")
    assert result.code == 0, result
    ((entry, _),) = cache.entries()
    assert entry.source == "lab/tiny"
    trained, start = pdrop_jax.load(tmp_path / "run/model"), pdrop_jax.load("lab/tiny")
    assert trained.config.text == start.config.text
    ours, before = trained.params["embed"]["embedding"], start.params["embed"]["embedding"]
    assert 0 < jnp.abs(ours - before).max() < 0.1


def test_chat_takes_an_id(hub, tiny, pdrop, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
    assert pdrop("chat", "--model", "lab/tiny").code == 0


def test_one_conversion_for_each_commit_and_dtype(hub, tiny):
    first = model_folder("lab/tiny")
    assert model_folder("lab/tiny@main", jnp.float32) == first
    half = model_folder("lab/tiny", "bfloat16")
    assert half != first
    model = pdrop_jax.load("lab/tiny", dtype=jnp.bfloat16, schedule=pdrop_jax.DropSchedule((1,), (0.25,)))
    assert (model.config.schedule.layers, model.params["embed"]["embedding"].dtype) == ((1,), jnp.bfloat16)
    commit = tiny.refs["main"]
    tiny.commit({"README.md": b"changed"})
    assert model_folder("lab/tiny") not in (first, half)
    assert model_folder(f"lab/tiny@{commit}") == first
    assert len(cache.entries()) == 3


def test_a_converted_model_on_the_hub_is_used_as_it_is(hub, local, tmp_path):
    convert(local, tmp_path / "ours")
    hub.repo("lab/ours").commit_folder(tmp_path / "ours")
    model = pdrop_jax.load("lab/ours")
    np.testing.assert_array_equal(
        model.params["embed"]["embedding"], pdrop_jax.load(tmp_path / "ours").params["embed"]["embedding"]
    )
    assert cache.entries() == []


def test_a_folder_is_converted_again_when_its_files_change(local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = model_folder(local)
    assert model_folder("local") == first
    assert (cache.entries()[0][0].source, first.name) == (str(local), "local")
    weights = local / "model.safetensors"
    before = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = model_folder(local)
    os.utime(tmp_path / "clip_tower" / "model.safetensors")
    assert len({first, second, model_folder(local)}) == 3
    ours = tmp_path / "ours"
    convert(local, ours)
    assert model_folder(ours) == ours


def test_without_a_network_the_kept_model_answers(hub, tiny, monkeypatch):
    kept = model_folder("lab/tiny")
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)  # the downloaded files are not needed any more
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert model_folder("lab/tiny") == kept
    assert model_folder(f"lab/tiny@{tiny.refs['main']}") == kept
    with pytest.raises(pdrop_jax.UserError, match="unset HF_HUB_OFFLINE"):
        model_folder("lab/tiny@v2")


def test_a_real_process_without_a_network(hub, tiny, pdrop):
    """The settings of the environment, as a user makes them."""
    online = pdrop("generate", "--model", "lab/tiny", *ASK)
    command = [*PDROP, "generate", "--model", "lab/tiny", *map(str, ASK)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["token_ids"] == json.loads(online.stdout)["token_ids"]


STUCK = """
import sys, time
from pdrop_jax.checkpoint import storage
from pdrop_jax.convert.cache import model_folder
def write(folder, arrays):
    (folder / "begun").touch()
    print("begun", flush=True)
    time.sleep(600)
storage.write = write
model_folder("lab/tiny")
"""


def test_a_killed_conversion_is_no_model_and_the_next_one_waits_for_it(hub, tiny, pdrop, fails, capfd):
    """Another process is killed in the middle of a conversion, while two others wait, of which one converts."""
    other = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    found, said = [], ""
    waiting = [threading.Thread(target=lambda: found.append(model_folder("lab/tiny"))) for _ in range(2)]
    try:
        assert other.stdout.readline() == "begun\n"
        assert pdrop("cache", "list").stdout.startswith("0 models, ")
        assert list(cache.root().rglob("begun"))  # it has not been cleaned away
        for thread in waiting:
            thread.start()
        while said.count("waiting for another process") < 2:
            time.sleep(0.02)
            said += capfd.readouterr().err
            assert all(thread.is_alive() for thread in waiting)
        assert not found
    finally:
        other.kill()
        other.wait()
    for thread in waiting:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert (said + capfd.readouterr().err).count("converting to") == 1
    assert LlavaConfig.load(found[0]).text.num_kv_heads == 2
    assert not list(cache.root().rglob("begun"))


def test_what_was_killed_is_cleaned_by_the_next_start(hub, tiny):
    leftover = cache.root() / "0123456789abcdef-float32"
    (leftover / "tiny.unfinished").mkdir(parents=True)
    (leftover / "tiny.unfinished" / "config.json").write_text("{}")
    model_folder("lab/tiny")
    assert not leftover.exists()


def test_a_conversion_that_fails_leaves_nothing(hub, tiny, fails):
    tiny.commit({"model.safetensors": tiny.files["model.safetensors"][:-100]})
    assert "download or copy it again" in fails("generate", "--model", "lab/tiny", *ASK)
    assert list(cache.root().glob("*-*")) == []


def test_list_and_clear(hub, tiny, local, pdrop, fails):
    for name, dtype in (("lab/tiny", None), ("lab/tiny", "bfloat16"), (local, None)):
        model_folder(name, dtype)
    os.utime(cache.entries()[0][1] / "entry.json", (0, 0))
    lines = pdrop("cache", "list").stdout.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("3 models, ")
    assert sum(line.endswith("lab/tiny") for line in lines) == 2
    rows = json.loads(pdrop("cache", "list", "lab/tiny", "--json").stdout)
    assert [row["key"] for row in rows] == [tiny.refs["main"]] * 2
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(row["bytes"] > 100_000 for row in rows)
    assert "lab/none is not in" in fails("cache", "clear", "lab/none")
    assert pdrop("cache", "clear", rows[0]["id"]).stdout.startswith("1 models, ")
    assert pdrop("cache", "clear", local).stdout.startswith("1 models, ")
    assert [row["id"] for row in json.loads(pdrop("cache", "list", "--json").stdout)] == [rows[1]["id"]]
    assert pdrop("cache", "clear").code == 0
    assert cache.entries() == []
