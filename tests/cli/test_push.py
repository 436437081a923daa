"""``pdrop export --push-to-hub``: the real client uploads to a Hub on loopback."""

import json
import pathlib

import numpy as np
import pytest
import yaml
from hub_server import LFS_BYTES, TOKEN

import pdrop_jax
from pdrop_jax.convert.importer import convert
from pdrop_jax.schedule import DropSchedule

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOKENIZER = pathlib.Path(__file__).parents[2] / "examples" / "tiny_tokenizer"
SCHEDULE = DropSchedule((2, 4), (0.5, 0.25))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A converted model whose source was a folder."""
    folder = tmp_path_factory.mktemp("push")
    convert(GOLDEN / "model_gqa", folder / "model", tokenizer=TOKENIZER, schedule=SCHEDULE)
    return folder / "model"


@pytest.fixture
def signed_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def card_of(repo):
    """The metadata and the text of a model card."""
    _, metadata, text = repo.files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_an_export_with_its_card(hub, tiny, signed_in, pdrop, tmp_path):
    """From the Hub to the Hub: the source and its revision are on the card."""
    assert pdrop("convert", "lab/tiny", tmp_path / "model", "--layers", 2, 4, "--ratios", 0.5, 0.25).code == 0
    push = ("--push-to-hub", "me/pruned", "--private")
    result = pdrop("export", tmp_path / "model", tmp_path / "out", "--format", "original", *push)
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == f"{hub.url}/me/pruned"
    repo = hub.repos["me/pruned"]
    assert repo.private
    on_disk = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {name: data for name, data in repo.files.items() if name in on_disk} == on_disk
    assert len(on_disk["model.safetensors"]) > LFS_BYTES
    metadata, text = card_of(repo)
    assert metadata["base_model"] == "lab/tiny"
    assert metadata["pipeline_tag"] == "image-text-to-text"
    commit = tiny.refs["main"]
    assert f"Converted from [lab/tiny](https://huggingface.co/lab/tiny), revision `{commit}`" in text
    assert f"by pdrop-jax {pdrop_jax.__version__}" in text
    assert "keeps 0.5 of them after layer 2, 0.25 of them after layer 4" in text
    assert "runs the model without drops" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    load = code.splitlines()[2]
    found = {}
    exec(f"import pdrop_jax\n{load}", found)  # as the card says
    assert found["model"].config.schedule == pdrop_jax.load(tmp_path / "model").config.schedule


def test_a_repository_that_exists_gets_a_commit(hub, model, signed_in, pdrop, tmp_path):
    """Weights of before are removed, other files stay; transformers loads what is on the Hub."""
    repo = hub.repo("me/model")
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "params/1/d": b"old"}
    repo.commit({**old, "notes.txt": b"mine"})
    assert pdrop("export", model, tmp_path / "out", "--format", "hf", "--push-to-hub", "me/model").code == 0
    assert "notes.txt" in repo.files
    assert not set(old) & set(repo.files)
    _, text = card_of(repo)
    assert "Converted from the folder `model_gqa`" in text
    assert str(tmp_path) not in text
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained("me/model")
    assert loaded.config.text_config.num_key_value_heads == 2
    assert 'AutoModelForImageTextToText.from_pretrained("me/model")' in text
    ours, before = pdrop_jax.load("me/model", SCHEDULE), pdrop_jax.load(model)
    assert ours.config.schedule == before.config.schedule
    embedding = before.params["embed"]["embedding"]
    np.testing.assert_array_equal(ours.params["embed"]["embedding"][: len(embedding)], embedding)


def test_our_own_format_keeps_the_schedule(hub, model, signed_in, pdrop, tmp_path):
    assert pdrop("export", model, tmp_path / "out", "--format", "pdrop", "--push-to-hub", "me/ours").code == 0
    assert pdrop_jax.load("me/ours").config == pdrop_jax.load(model).config
    assert 'pdrop_jax.load("me/ours")\n' in card_of(hub.repos["me/ours"])[1]
    assert json.loads((tmp_path / "out" / "source.json").read_text())["checkpoint"] == "model_gqa"


def test_an_upload_that_may_not_be_fails_before_the_export(hub, model, fails, tmp_path, monkeypatch, impatient):
    export = ("export", model, tmp_path / "out", "--format", "hf")
    assert "log in with `hf auth login` or set HF_TOKEN" in fails(*export, "--push-to-hub", "me/model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    denied = fails(*export, "--push-to-hub", "others/model")
    assert f"others/model cannot be created: {hub.url} denies access" in denied
    for name in ("model", "me/model@v1", "me/../model", f"{hub.url}/me/model"):
        assert f"--push-to-hub takes OWNER/NAME, got {name!r}" in fails(*export, "--push-to-hub", name)
    hub.repo("me/public").commit({})
    assert "me/public exists and is public" in fails(*export, "--push-to-hub", "me/public", "--private")
    assert "--private requires --push-to-hub" in fails(*export, "--private")
    hub.fault = lambda method, path: 503
    assert "cannot be created" in fails(*export, "--push-to-hub", "me/model")
    assert not (tmp_path / "out").exists()
    assert not set(hub.repos) & {"me/model", "others/model"}


@pytest.mark.parametrize("part", ["/store/", "/commit/", "/preupload/", "/objects/batch"])
def test_an_upload_that_breaks_is_one_line_and_can_go_on(part, hub, model, signed_in, pdrop, tmp_path, impatient):
    hub.fault = lambda method, path: 503 if part in path else None
    result = pdrop("export", model, tmp_path / "out", "--format", "hf", "--push-to-hub", "me/model")
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert f"me/model cannot be uploaded: {hub.url} answers with status 503; try again later" in line
    assert line.endswith(f"The export is in {tmp_path / 'out'}: hf upload me/model {tmp_path / 'out'}")
    assert set(hub.repos["me/model"].files) == {".gitattributes"}  # no half of it


def test_an_upload_survives_faults(hub, model, signed_in, pdrop, tmp_path, impatient):
    seen = set()

    def once(method, path):
        new = path not in seen
        seen.add(path)
        return 503 if new and path.startswith(("/store", "/api", "/me")) else None

    hub.fault = once
    result = pdrop("export", model, tmp_path / "out", "--format", "hf", "--push-to-hub", "me/model")
    assert (result.code, result.stderr) == (0, "")
    assert hub.repos["me/model"].files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
