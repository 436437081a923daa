"""Other clients: transformers' chat command, locust, Prometheus' parser, a browser's first request."""

import json
import os
import subprocess
import sys

import httpx
from prometheus_client.parser import text_string_to_metric_families
from served import KEY, SLOTS, said

LOCUSTFILE = """
from locust import HttpUser, task

class Client(HttpUser):
    @task
    def ask(self):
        body = {body!r}
        answer = self.client.post("/v1/chat/completions", json=body, headers={{"Authorization": "Bearer {key}"}})
        assert answer.json()["usage"]["completion_tokens"] > 0
"""


def test_transformers_chat(url):
    """Two questions, the second of which comes with the answer to the first."""
    call = ["chat", "tiny", f"{url}/v1", "do_sample=False", "max_new_tokens=4", "--user", "me"]
    program = "from transformers.cli.transformers import main; main()"
    environment = {**os.environ, "HF_TOKEN": KEY, "TERM": "dumb", "COLUMNS": "200"}
    asked = "How many bags are there?\nn\nAnd shirts?\nn\n!exit\n"
    run = subprocess.run(
        [sys.executable, "-c", program, *call],
        input=asked,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    headers = {"Authorization": f"Bearer {KEY}"}
    messages, body = said("How many bags are there?"), {"model": "tiny", "temperature": 0, "max_tokens": 4}
    for _ in range(2):
        answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "messages": messages}, headers=headers).json()
        text = answer["choices"][0]["message"]["content"]
        assert text
        assert text in run.stdout
        messages += [{"role": "assistant", "content": text}, *said("And shirts?")]


def test_locust(url, tmp_path):
    """Eight clients at once: more than there are slots."""
    (tmp_path / "locustfile.py").write_text(
        LOCUSTFILE.format(
            key=KEY, body={"model": "tiny", "messages": said("How many?"), "temperature": 0, "max_tokens": 4}
        )
    )
    call = ["-f", str(tmp_path / "locustfile.py"), "--headless", "-u", "8", "-r", "8", "-t", "2s", "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "locust", *call, "--host", url], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    (found,) = json.loads(run.stdout)
    assert found["num_failures"] == 0
    assert found["num_requests"] > 8


def test_metrics_tell_what_happened(url, post, service):
    def read():
        text = httpx.get(f"{url}/metrics").text
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = read()
    answer = post(json={"messages": said("How many?"), "pdrop": "dense", "max_tokens": 3}).json()
    after = read()

    def change(*key):
        return after[key] - before.get(key, 0)

    assert change("pdrop_new_tokens_total", "dense") == answer["usage"]["completion_tokens"]
    assert change("pdrop_prompt_tokens_total", "dense") == answer["usage"]["prompt_tokens"]
    assert change("pdrop_answers_total", "dense", answer["choices"][0]["finish_reason"]) == 1
    assert change("pdrop_first_token_seconds_count", "dense") == 1
    assert change("pdrop_responses_total", "/v1/chat/completions", "200") == 1
    assert change("pdrop_compilations_total") == 0
    assert after["pdrop_slots", "dense"] == SLOTS
    assert after["pdrop_cache_bytes", "dense"] == service.engines["dense"].memory
    assert after["pdrop_queue", "dense"] == after["pdrop_running", "dense"] == 0


def test_models_and_page(url, models):
    (found,) = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()["data"]
    budgets = {name: model.config.schedule.to_json() for name, model in models.items()}
    assert found["id"] == "tiny"
    layers = models["own"].config.text.num_layers
    assert found["pdrop"] == {"default": "own", "num_layers": layers, "budgets": budgets}
    page = httpx.get(url)
    assert page.headers["content-type"].startswith("text/html")
    assert "PyramidDrop" in page.text
