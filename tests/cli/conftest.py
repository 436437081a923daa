"""A Hub for the ``pdrop`` command."""

import json
import os
import pathlib
import shutil
import time

import huggingface_hub
import pytest
from hub_server import serve

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOKENIZER = pathlib.Path(__file__).parents[2] / "examples" / "tiny_tokenizer"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and empty caches for the files and for the converted models."""
    state, server = serve()
    monkeypatch.setenv("PDROP_CACHE", str(tmp_path / "converted"))
    yield state
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()  # its connections would still be answered
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def impatient(monkeypatch):
    """The waits between two tries of a request are a thousandth as long."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 1000))


@pytest.fixture
def tiny(hub):
    """A small LLaVA of the original format on the Hub, "lab/tiny", whose tower is inside and in "lab/tower" too."""
    hub.repo("lab/tower").commit_folder(GOLDEN / "clip_tower")
    repo = hub.repo("lab/tiny")
    repo.commit_folder(TOKENIZER)
    config = json.loads((GOLDEN / "model_gqa" / "config.json").read_text()) | {"mm_vision_tower": "lab/tower"}
    repo.commit_folder(GOLDEN / "model_gqa", **{"config.json": json.dumps(config).encode()})
    return repo
