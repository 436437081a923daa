"""A server in this process, with two drop budgets of a small random model that speaks the demo model's words."""

import time

import httpx
import openai
import pytest
from served import KEY, LONGEST, SLOTS, WAITING, serving
from tiny_server import write_model

import pdrop_jax
from pdrop_jax.batch import Bucket
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.download import DownloadRules
from pdrop_jax.serve.budgets import models_for
from pdrop_jax.serve.service import Service


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    write_model(folder)
    return folder


@pytest.fixture(scope="session")
def models(folder):
    return models_for(pdrop_jax.load(folder), ["own", "dense"])


@pytest.fixture(scope="session")
def generate(models):
    """The library's answer to one question."""

    def generate(question, images=(), sampling=Sampling(LONGEST), budget="own"):
        return pdrop_jax.generate(models[budget], [question], [list(images)], sampling)

    return generate


@pytest.fixture(scope="session")
def service(models):
    return Service(
        "tiny",
        models,
        slots=SLOTS,
        max_new_tokens=LONGEST,
        images=2,
        downloads=DownloadRules(hosts=("127.0.0.1",), max_bytes=2**20, seconds=0.5),
        buckets=[Bucket(64, (144, 144))],  # one program for all prompts
        prefill_rows=1,
        max_waiting=WAITING,
    )


@pytest.fixture(scope="session")
def url(service):
    with serving(service, api_key=KEY, body_bytes=2**22) as url:
        while (answer := httpx.get(f"{url}/health")).status_code != 200:
            assert answer.json() == {"status": "warming up"}
            time.sleep(0.05)
        yield url


@pytest.fixture(scope="session")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def post(url):
    """Posts to the chat route with the key."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as session:
        yield lambda **options: session.post("/v1/chat/completions", **options)


@pytest.fixture
def idle(service):
    """Waits until no request is in an engine or being answered."""

    def wait():
        until = time.monotonic() + 30
        while service.active or any(engine.running + engine.waiting for engine in service.engines.values()):
            assert time.monotonic() < until, service.engines
            time.sleep(0.01)

    return wait
