"""Buckets that fail some requests, or all of them: nothing is lost, and the reason is one line."""

import asyncio
import importlib.util
import json

import fsspec
import jax
import numpy as np
import pytest
from tiny_run import CONFIG

import pdrop_jax
from pdrop_jax import checkpoint, paths
from pdrop_jax.checkpoint import remote, storage
from pdrop_jax.errors import UserError
from pdrop_jax.generation.pretrained import DEMO
from pdrop_jax.model.params import init_params
from pdrop_jax.paths import as_path, files_below

DENIED = {
    "gs": b'{"error": {"code": 403, "message": "x does not have storage.objects.create access"}}',
    "s3": b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
}


@pytest.fixture
def impatient(monkeypatch):
    """Waits a hundredth of the time between attempts."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *rest: sleep(seconds / 100, *rest))
    monkeypatch.setattr(remote, "PAUSE", remote.PAUSE / 100)


def test_a_bucket_that_fails_one_request_in_twenty(bucket, server, impatient):
    params = init_params(CONFIG, seed=1)
    server.reset(share=0.05)
    checkpoint.save(bucket / "model", CONFIG, params)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(bucket / "model")[1], params)
    assert server.failed >= 3


def test_a_bucket_that_fails_for_good(bucket, server, impatient, fails):
    server.reset(share=1.0)
    assert "does not answer as expected" in fails("export", DEMO, bucket / "model", "--format", "pdrop")
    with pytest.raises(UserError, match=r"cannot be written: .* does not answer as expected") as caught:
        storage.write(bucket / "model", [("x", np.ones(3, np.float32))])
    assert "\n" not in str(caught.value)
    server.reset()
    assert not files_below(bucket)


def test_no_permission(bucket, server, impatient, fails):
    server.reset(answer=(403, DENIED[bucket.parts[1]]))
    assert "denies access to the bucket" in fails("export", DEMO, bucket / "model", "--format", "hf")
    assert "denies access to the bucket" in fails("generate", "--model", bucket / "model", "--prompt", "Who?")


def test_no_credentials(name, servers, monkeypatch, impatient):
    text = "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."
    servers["gs"].reset(answer=(401, json.dumps({"error": {"code": 401, "message": text}}).encode()))
    with pytest.raises(UserError, match="no credentials for Google Cloud Storage were found: run gcloud auth"):
        pdrop_jax.load(f"gs://{name}/model")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match="no credentials for S3 were found: run aws configure"):
        pdrop_jax.load(f"s3://{name}/model")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_bucket_that_does_not_exist(bucket, fails):
    missing = as_path(f"{bucket}-missing")
    assert fails("export", DEMO, missing / "model", "--format", "hf").endswith(f"there is no bucket {missing}")
    assert fails("generate", "--model", missing / "model", "--prompt", "Who?").endswith(f"no bucket {missing}")
    assert fails("cost", "--model", bucket / "model").endswith("is not a checkpoint: it has no config.json")


@pytest.mark.parametrize(("scheme", "library"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_library_that_is_not_installed(scheme, library, monkeypatch, fails):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    paths._prepare.cache_clear()
    said = fails("export", DEMO, f"{scheme}://bucket/model", "--format", "hf")
    assert said.endswith(f"need {library}: pip install 'pdrop-jax[{'gcs' if scheme == 'gs' else scheme}]'")
    paths._prepare.cache_clear()
