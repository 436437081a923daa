"""Models named by their id on the Hugging Face Hub: the real client, against a Hub on loopback."""

import itertools
import json
import pathlib
import shutil

import huggingface_hub
import pytest
from hub_server import LFS_BYTES, TOKEN
from safetensors.numpy import load_file, save_file

from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.cache import root
from pdrop_jax.convert.hub import fetch_weights, locate
from pdrop_jax.convert.towers import on_hub

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
COST = ("--image-tokens", 16)
NEVER = "--prompt", "Hi", "--max-new-tokens", 1


def split(repo, folder, parts=2):
    """Replaces the weights in ``repo`` by several files and their index."""
    tensors = load_file(folder / "model.safetensors")
    names, files, index = sorted(tensors), {}, {}
    for n in range(parts):
        file = f"model-{n + 1:05}-of-{parts:05}.safetensors"
        index |= dict.fromkeys(names[n::parts], file)
        save_file({name: tensors[name] for name in names[n::parts]}, folder / file, metadata={"format": "pt"})
        files[file] = (folder / file).read_bytes()
    files["model.safetensors.index.json"] = json.dumps({"weight_map": index}).encode()
    return repo.commit(files | {"model.safetensors": None})


@pytest.fixture
def copy(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN / "model_gqa", tmp_path / "copy"))


def source_of(model):
    return json.loads((model / "source.json").read_text())


def test_convert_downloads_the_files_that_it_reads(hub, tiny, copy, pdrop, tmp_path):
    split(tiny, copy)
    tiny.commit({"README.md": b"", "pytorch_model.bin": b"the same", "model-consolidated.safetensors": b"again"})
    tiny.refs["v1"] = tiny.refs["main"]
    tiny.commit({"config.json": b"{}"})
    result = pdrop("convert", "lab/tiny@v1", tmp_path / "model")
    assert (result.code, result.stderr) == (0, "")
    assert LlavaConfig.load(tmp_path / "model").text.num_kv_heads == 2
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    source = source_of(tmp_path / "model")
    assert (source["checkpoint"], source["commit"], source["vision_tower"]) == (
        "lab/tiny",
        tiny.refs["v1"],
        "lab/tower",
    )
    sent = [path for method, path in hub.requests if method == "GET" and path.startswith(("/cdn", "/lab"))]
    assert len(sent) == len(set(sent))  # nothing twice
    assert not [path for path in sent if path.endswith((".md", ".bin", "consolidated.safetensors"))]
    assert any(path.endswith("model-00002-of-00002.safetensors") for path in sent)
    assert hub.stray_tokens == 0


def test_pickles_are_downloaded_where_there_is_nothing_better(hub):
    part = "pytorch_model-00001-of-00001.bin"
    index = json.dumps({"weight_map": {"x": part}}).encode()
    pickles = {part: b"", "pytorch_model.bin.index.json": index, "mm_projector.bin": b"", "model.ckpt": b""}
    repo = hub.repo("lab/old")
    repo.commit({"config.json": b"{}"} | pickles)
    fetched = {path.name for path in fetch_weights(locate("lab/old")).iterdir()}
    assert fetched == {"config.json", *pickles} - {"model.ckpt"}
    repo.commit({"model.safetensors": b""})
    fetched = {path.name for path in fetch_weights(locate("lab/old")).iterdir()}
    assert fetched == {"config.json", "model.safetensors", "mm_projector.bin"}


def test_the_tower_of_a_config_on_the_hub(hub):
    clip = "openai/clip-vit-large-patch14-336"
    assert on_hub(clip) == on_hub("/home/author/clip-vit-large-patch14-336") == clip
    assert on_hub("lab/tower") == "lab/tower"
    assert on_hub("/home/author/tower") is on_hub("tower") is on_hub(None) is None


def test_a_folder_of_that_name_wins(hub, tiny, copy, pdrop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "clip_tower", tmp_path / "clip_tower")
    shutil.copytree(copy, tmp_path / "lab" / "tiny")
    shutil.copytree(GOLDEN / "clip_tower", tmp_path / "lab" / "clip_tower")
    assert pdrop("convert", "lab/tiny", "model").code == 0
    assert hub.requests == []
    assert source_of(tmp_path / "model")["commit"] is None


def without_tower(repo, copy):
    tensors = {name: x for name, x in load_file(copy / "model.safetensors").items() if "vision_tower" not in name}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    repo.commit({"model.safetensors": (copy / "model.safetensors").read_bytes()})


def test_the_tower_that_an_original_checkpoint_names_is_fetched(hub, tiny, copy, pdrop, fails, tmp_path):
    tower = tiny.files["config.json"]
    without_tower(tiny, copy)
    assert pdrop("convert", "lab/tiny", tmp_path / "model").code == 0
    found = source_of(tmp_path / "model")
    assert (found["vision_tower"], found["vision_commit"]) == ("lab/tower", hub.repos["lab/tower"].refs["main"])
    assert (tmp_path / "model" / "preprocessor_config.json").is_file()
    tiny.commit({"config.json": tower.replace(b"lab/tower", b"lab/other")})
    line = fails("convert", "lab/tiny", tmp_path / "again")
    assert "lab/tiny needs a separate vision tower, and lab/other is neither a folder here nor a model" in line
    assert line.endswith("or pass its folder, --vision DIR")
    assert pdrop("convert", "lab/tiny", tmp_path / "given", "--vision", "lab/tower").code == 0


def test_a_new_model_of_parts_on_the_hub(hub, tiny, copy, pdrop, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.startswith("mm_")} | {"model_type": "llama"}
    tensors = load_file(copy / "model.safetensors")
    language = {name: x for name, x in tensors.items() if not {"vision_tower", "mm_projector"} & set(name.split("."))}
    save_file(language, copy / "model.safetensors", metadata={"format": "pt"})
    weights = (copy / "model.safetensors").read_bytes()
    hub.repo("lab/llm").commit({"config.json": json.dumps(kept).encode(), "model.safetensors": weights})
    parts = ("--llm", "lab/llm", "--vision", "lab/tower", "--tokenizer", "lab/tiny")
    result = pdrop("convert", *parts, tmp_path / "start")
    assert result.code == 0, result
    assert source_of(tmp_path / "start")["checkpoint"] == "lab/llm"
    assert (tmp_path / "start" / "tokenizer.json").is_file()
    assert "tiny" not in "".join(path for _, path in hub.requests if path.endswith("model.safetensors"))


def test_an_unsupported_model_is_not_downloaded(hub, fails, tmp_path):
    hub.repo("lab/bert").commit({"config.json": b'{"model_type": "bert"}', "model.safetensors": bytes(LFS_BYTES)})
    assert "model_type" in fails("convert", "lab/bert", tmp_path / "model")
    assert "model_type" in fails("generate", "--model", "lab/bert", *NEVER)
    assert hub.downloads() == ["config.json"]
    hub.repo("lab/empty").commit({"README.md": b""})
    assert fails("generate", "--model", "lab/empty", *NEVER).endswith(
        "lab/empty is not a checkpoint: it has no config.json"
    )


def refusals(hub):
    """What is asked for, and a part of the line that is printed."""
    hub.repo("lab/private", private=True).commit({"config.json": b"{}"})
    hub.repo("lab/gated", gated=True).commit({"config.json": b"{}"})
    hub.repo("lab/open").commit({"config.json": b"{}"})
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    return {
        "lab/none": f"neither a folder here nor a model that {hub.url} shows you: if it is private, {log_in}",
        "lab/private": f"neither a folder here nor a model that {hub.url} shows you: if it is private, {log_in}",
        "lab/gated": f"lab/gated is gated: accept its terms at {hub.url}/lab/gated, then {log_in} of that account",
        "lab/open@v9": "lab/open has no such revision; name a branch, a tag or a whole commit hash of",
        f"lab/open@{'0' * 40}": "lab/open has no such revision",
        "https://huggingface.co/lab/open": "is the address of a web page: name the model itself, lab/open",
        "https://huggingface.co/lab/open/tree/v1": "name the model itself, lab/open@v1",
        "hf://lab/open": "name the model itself, lab/open",
        "https://example.com/lab/open": "is not a checkpoint: it has no config.json",
    }


def test_every_refusal_is_one_line(hub, fails, tmp_path):
    for name, part in refusals(hub).items():
        for command in (("convert", name, tmp_path / "out"), ("generate", "--model", name, *NEVER)):
            line = fails(*command)
            assert part in line, line
            assert name.partition("@")[0] in line or name.startswith("https")
    assert not (tmp_path / "out").exists()
    assert not root().exists()


def test_a_token_opens_a_private_repository(hub, tiny, pdrop, fails, tmp_path, monkeypatch):
    tiny.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "lab/tiny" in fails("convert", "lab/tiny", tmp_path / "model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pdrop("convert", "lab/tiny", tmp_path / "model").code == 0
    assert hub.stray_tokens == 0  # the store of large files is another server


def test_without_a_network(hub, tiny, copy, pdrop, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = fails("convert", "lab/tiny", tmp_path / "none")
    assert "is neither a folder here nor complete in the Hub's cache" in line
    assert line.endswith("downloads are switched off: unset HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert pdrop("cost", "--model", "lab/tiny", *COST).code == 0
    assert not {"model.safetensors", "tokenizer.json"} & set(hub.downloads())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert pdrop("cost", "--model", "lab/tiny", *COST).code == 0
    assert "complete in the Hub's cache" in fails("convert", "lab/tiny", tmp_path / "none")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert pdrop("convert", "lab/tiny", tmp_path / "first").code == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert pdrop("convert", "lab/tiny", tmp_path / "second").code == 0
    assert len(hub.requests) == asked
    assert not (tmp_path / "none").exists()


def test_a_server_that_cannot_be_reached(fails, tmp_path):
    line = fails("convert", "lab/tiny", tmp_path / "model")
    assert "lab/tiny is not a folder here, and cannot be downloaded: http://127.0.0.1" in line
    assert line.endswith("check the network and HF_ENDPOINT")


@pytest.mark.parametrize("fault", [503, "truncate", "short", "drop"])
def test_a_fault_of_every_kind_of_request_is_passed_over(fault, hub, tiny, pdrop, tmp_path, impatient):
    """Each address fails once, the metadata of files included."""
    seen = set()

    def once(method, path):
        new = (method, path) not in seen
        seen.add((method, path))
        big = path.startswith("/cdn") if fault in ("truncate", "short") else True
        return fault if new and big else None

    hub.fault = once
    result = pdrop("convert", "lab/tiny", tmp_path / "model")
    assert (result.code, result.stderr) == (0, "")


def test_one_request_in_twenty_fails_and_nothing_is_lost(hub, tiny, copy, pdrop, tmp_path, impatient):
    split(tiny, copy, parts=30)
    expected = {name: data for name, data in tiny.files.items() if name.endswith(".safetensors")}
    faults, number = itertools.cycle([500, "truncate", "drop", 503]), itertools.count(1)
    hub.fault = lambda method, path: None if next(number) % 20 else next(faults)
    assert pdrop("convert", "lab/tiny", tmp_path / "model").code == 0
    assert len(hub.requests) > 80  # four or more of them failed
    (snapshot,) = pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE).glob("models--lab--tiny/snapshots/*")
    assert {name: (snapshot / name).read_bytes() for name in expected} == expected


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (503, "answers with status 503; try again later"),
        ("short", "Consistency check failed: file should be of size"),
        ("drop", "Server disconnected"),
    ],
)
def test_a_fault_that_stays_is_one_line(fault, part, hub, tiny, fails, tmp_path, impatient):
    hub.fault = lambda method, path: fault if "model.safetensors" in path and method == "GET" else None
    for command in (("convert", "lab/tiny", tmp_path / "model"), ("generate", "--model", "lab/tiny", *NEVER)):
        line = fails(*command)
        assert "lab/tiny is not a folder here, and cannot be downloaded: " in line
        assert part in line
    assert not list(tmp_path.glob("model*"))
    assert not list(root().glob("*-*"))
    assert not list(pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.incomplete"))
    assert len([path for _, path in hub.requests if "model.safetensors" in path]) < 100
