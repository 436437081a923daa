"""Checkpoints that cannot be converted: one clear error, and nothing is written."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from command import PDROP
from mutations import make_special, one_line
from safetensors.numpy import load_file, save_file
from tiny_torch import edit_json, rewrite, weights

from pdrop_jax.checkpoint import storage
from pdrop_jax.convert import importer
from pdrop_jax.convert.exporter import export
from pdrop_jax.convert.importer import convert
from pdrop_jax.errors import UserError


def refused(source, tmp_path, message, lines=1, **kwargs):
    """Converts, expects an error that matches and that nothing is left; returns the message."""
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        convert(source, tmp_path / "out", **kwargs)
    assert set(tmp_path.iterdir()) == before
    text = str(caught.value)
    assert lines is None or len(text.splitlines()) == lines
    return text


def test_all_that_is_wrong_with_the_tensors_is_reported_at_once(hf, tmp_path):
    def spoil(tensors):
        del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
        del tensors["multi_modal_projector.linear_2.bias"]
        tensors["language_model.model.norm.weight"] = np.zeros(47, np.float32)
        tensors["vision_tower.post_layernorm.bias"] = np.zeros(31, np.float32)
        tensors["language_model.model.layers.3.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        return tensors

    rewrite(hf, spoil)
    text = refused(hf, tmp_path, "2 missing, 1 unexpected, 2 of another shape", lines=6)
    for part in (
        "missing: language_model.model.layers.1.mlp.up_proj.weight [96, 48]",
        "missing: multi_modal_projector.linear_2.bias [48]",
        "wrong shape: language_model.model.norm.weight is [47], expected [48]",
        "wrong shape: vision_tower.post_layernorm.bias is [31], expected [32]",
        "unexpected: language_model.model.layers.3.mlp.up_proj.weight [2, 2]",
    ):
        assert part in text


def test_a_long_list_is_cut_and_counted(hf, tmp_path):
    edit_json(hf / "config.json", text_config={"model_type": "llama", "num_hidden_layers": 3})
    text = refused(hf, tmp_path, "of another shape", lines=None)
    assert len(text.splitlines()) == 22
    assert text.splitlines()[-1].endswith("more")


def test_the_message_names_the_tensors_as_the_checkpoint_does(original, tmp_path):
    rewrite(original, lambda tensors: {name: x for name, x in tensors.items() if "layers.5.self_attn.q" not in name})
    refused(original, tmp_path, "missing: model.layers.5.self_attn.q_proj.weight", lines=2)


def test_a_folder_that_is_no_checkpoint(hf, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "is not a checkpoint: it has no config.json")
    refused(tmp_path / "nowhere", tmp_path, "is not a checkpoint")
    (hf / "model.safetensors").unlink()
    refused(hf, tmp_path, "it has neither model.safetensors nor pytorch_model.bin")


def test_a_checkpoint_that_is_converted_already(hf, tmp_path):
    convert(hf, tmp_path / "ours")
    refused(tmp_path / "ours", tmp_path, "is already converted")


@pytest.mark.parametrize("left", [5, 300, -10])
def test_a_truncated_safetensors_file(left, hf, tmp_path):
    data = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(data[:left])
    refused(hf, tmp_path, "model.safetensors cannot be read, download or copy it again")


def test_a_missing_part(hf, tmp_path):
    names = list(load_file(hf / "model.safetensors"))
    (hf / "model.safetensors").rename(hf / "a.safetensors")
    weight_map = dict.fromkeys(names, "a.safetensors") | {names[0]: "b.safetensors"}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(hf, tmp_path, "lists 2 files, missing b.safetensors")


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_wants_to_run_code(how, hf, tmp_path):
    (hf / "model.safetensors").unlink()
    data = {"language_model.model.norm.weight": Code(tmp_path / "it ran")}
    if how == "torch":
        torch.save(data, hf / "pytorch_model.bin")
    else:
        (hf / "pytorch_model.bin").write_bytes(pickle.dumps(data, protocol=2))
    refused(hf, tmp_path, "pytorch_model.bin is refused")
    assert not (tmp_path / "it ran").exists()


def test_a_damaged_pickle(hf, tmp_path):
    torch.save({name: torch.tensor(x) for name, x in weights(hf).items()}, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    data = (hf / "pytorch_model.bin").read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"no pickle"):
        (hf / "pytorch_model.bin").write_bytes(damaged)
        refused(hf, tmp_path, r"pytorch_model.bin (cannot be read|is refused)")
    torch.save([1, 2], hf / "pytorch_model.bin")
    refused(hf, tmp_path, "does not contain a dictionary of tensors")


def test_a_pickle_without_torch(hf, tmp_path, monkeypatch):
    torch.save({}, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(hf, tmp_path, r"pip install 'pdrop-jax\[torch\]'")


def test_quantised_tensors(hf, tmp_path):
    rewrite(hf, lambda tensors: tensors | {"language_model.model.norm.weight": np.zeros(48, np.int8)})
    refused(hf, tmp_path, "language_model.model.norm.weight is I8: convert the checkpoint from before it was")


def test_no_vision_tower_to_be_found(original, tmp_path):
    rewrite(original, lambda tensors: {name: x for name, x in tensors.items() if "vision_tower" not in name})
    shutil.move(tmp_path / "clip_tower", tmp_path / "elsewhere")
    refused(original, tmp_path, "'clip_tower' was not found: pass its folder, --vision DIR")
    refused(original, tmp_path, "has no config.json", vision=tmp_path / "nowhere")


def test_the_known_tower_has_a_config_but_no_weights(original, tmp_path):
    rewrite(original, lambda tensors: {name: x for name, x in tensors.items() if "vision_tower" not in name})
    name = "openai/clip-vit-large-patch14-336"
    edit_json(original / "config.json", mm_vision_tower=name, mm_hidden_size=1024)
    refused(
        original,
        tmp_path,
        f"needs a separate vision tower, and {name} is not a folder here, and cannot be downloaded: .* --vision DIR",
    )


def test_a_tower_for_a_checkpoint_that_holds_one(hf, original, tmp_path):
    refused(hf, tmp_path, "--vision is for original LLaVA", vision=tmp_path / "clip_tower")


def test_a_tokenizer_folder_without_tokenizer(hf, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(hf, tmp_path, "contains no tokenizer files", tokenizer=tmp_path / "empty")


def test_an_output_folder_that_exists(hf, tmp_path):
    (tmp_path / "out").mkdir()
    refused(hf, tmp_path, "out exists: remove it or choose another folder")
    convert(hf, tmp_path / "ours")
    with pytest.raises(UserError, match="out exists"):
        export(tmp_path / "ours", tmp_path / "out", "hf")


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["arrays", "unused", "config"])
def test_a_full_disk_leaves_nothing_behind(step, hf, tmp_path, monkeypatch):
    where = {
        "arrays": (storage.ocp, "save"),
        "unused": (importer, "write_safetensors"),
        "config": (importer.LlavaConfig, "save"),
    }
    monkeypatch.setattr(*where[step], full)
    with pytest.raises(OSError, match="No space left"):
        convert(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_disk_that_takes_no_more_is_one_line_and_exit_code_2(hf, tmp_path):
    # A limit on the size of files stands in for the disk: the system refuses the write in the same place.
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000)); "
    command = [*PDROP[:2], code + PDROP[2], "convert", str(hf), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("pdrop convert: ")
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_command_prints_the_error_and_exits_with_2(hf, tmp_path):
    (hf / "model.safetensors").write_bytes(b"")
    result = subprocess.run([*PDROP, "convert", str(hf), str(tmp_path / "out")], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("pdrop convert: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_killed_conversion_leaves_no_checkpoint(hf, tmp_path):
    code = (
        "import time; from pdrop_jax import checkpoint; from pdrop_jax.config import LlavaConfig; "
        "LlavaConfig.save = lambda *_: (print('written', flush=True), time.sleep(60)); "
    )
    command = [*PDROP[:2], code + PDROP[2], "convert", str(hf), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out.unfinished"}
    assert (tmp_path / "out.unfinished" / "params").is_dir()
    convert(hf, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


def test_an_unused_tensor_of_another_checkpoint(hf, tmp_path):
    convert(hf, tmp_path / "ours")
    save_file({"post_layernorm.bias": np.zeros(3, np.float32)}, tmp_path / "ours" / "unused.safetensors")
    with pytest.raises(UserError, match="missing, 0 unexpected, 1 of another shape"):
        export(tmp_path / "ours", tmp_path / "out", "hf")
    (tmp_path / "ours" / "unused.safetensors").unlink()
    with pytest.raises(UserError, match="18 missing"):
        export(tmp_path / "ours", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin"])
def test_what_is_no_file_is_refused_and_not_waited_for(name, kind, hf, tmp_path):
    (hf / name).unlink(missing_ok=True)
    if name == "pytorch_model.bin":
        (hf / "model.safetensors").unlink()
    make_special(kind, hf / name)
    with one_line((name, kind)) as said:
        convert(hf, tmp_path / "out")
    assert f"{hf / name} is a {kind}, expected a file" in said
    assert not (tmp_path / "out").exists()
