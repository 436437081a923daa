"""A server in this process, with two drop budgets of a small random model that speaks the demo model's words."""

import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from served import KEY, LONGEST, SLOTS, WAITING, serving

import pdrop_jax
from pdrop_jax import checkpoint
from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.download import DownloadRules
from pdrop_jax.model.params import abstract_params
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.serve.budgets import models_for
from pdrop_jax.serve.service import Service

CONFIG = LlavaConfig(
    VisionConfig(168, 14, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2),  # 144 image tokens
    TextConfig(312, 32, 48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_length=512),
    DropSchedule((1, 2), (0.5, 0.2)),
    image_aspect="pad",
    template="bare",
    eos_token_ids=(2,),
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint."""
    folder, rng = tmp_path_factory.mktemp("serve") / "tiny", np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), abstract_params(CONFIG))
    checkpoint.save(folder, CONFIG, params, companions=pdrop_jax.DEMO, single_file=True)
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
