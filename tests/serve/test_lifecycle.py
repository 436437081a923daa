"""``pdrop serve`` as a process: it starts, answers, and ends without breaking off an answer."""

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from command import PDROP
from served import GRID, LONGEST, PICTURE, said

from benchmarks.soak import memory, picture

ROW = "What is in row 3, column 2?"
OPTIONS = ["--slots", "1", "--images", "1", "--max-new-tokens", "40", "--max-prompt-tokens", "208", "--port", "0"]


@pytest.fixture
def process(folder, tmp_path):
    # With a cache of its own, or it might warn of an entry that another process is writing.
    environment = {**os.environ, "PDROP_API_KEY": "secret", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(
        [*PDROP, "serve", str(folder), *OPTIONS], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        line = process.stderr.readline()
        assert line.startswith("serving tiny on http://127.0.0.1:"), line + process.stderr.read()
        yield process, line.split()[-1]
        process.kill()


def test_running_answers_finish_after_sigterm(process, generate):
    process, url = process
    while (health := httpx.get(f"{url}/health")).status_code == 503:
        assert health.json() == {"status": "warming up"}
        time.sleep(0.1)
    chat, headers = f"{url}/v1/chat/completions", {"Authorization": "Bearer secret"}
    request = {"model": "tiny", "messages": said(PICTURE, ROW), "temperature": 0, "max_tokens": LONGEST}
    answer = httpx.post(chat, json=request, headers=headers, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == generate(ROW, [GRID]).texts[0]
    idle, began = http.client.HTTPConnection(url.removeprefix("http://")), time.monotonic()
    assert health_over(idle) == b'{"status":"ready"}'
    check_that_pictures_leave_no_memory(chat, headers, process.pid)
    time.sleep(max(0.0, began + 5.5 - time.monotonic()))  # clients keep a connection for 5 s
    assert health_over(idle) == b'{"status":"ready"}'
    idle.close()

    body = json.dumps({**request, "max_tokens": 40, "regex": "[a-z ]{900}"}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nConnection: close\r\n"
    head += "Expect: 100-continue\r\n"
    with socket.create_connection(url.removeprefix("http://").split(":")) as running:
        running.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        assert running.recv(2**16).startswith(b"HTTP/1.1 100 ")  # it is being answered, however fast the machine is
        running.sendall(body[:-1])
        process.send_signal(signal.SIGTERM)
        while (refused := httpx.post(chat, json=request, headers=headers, timeout=60)).status_code == 200:
            pass
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the server is stopping: try again later"
        assert httpx.get(f"{url}/health").json() == {"status": "stopping"}
        running.sendall(body[-1:])
        found = b"".join(iter(lambda: running.recv(2**16), b""))
    _, _, content = found.partition(b"\r\n\r\n")
    (choice,) = json.loads(content)["choices"]
    assert choice["finish_reason"] == "length"
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


def health_over(connection):
    connection.request("GET", "/health")
    return connection.getresponse().read()


def check_that_pictures_leave_no_memory(chat, headers, pid):
    """Each takes 256 MiB while it is decoded; as many are decoded at a time as there are CPUs."""
    before = memory(pid)
    request = {"model": "tiny", "messages": said(picture(8000, 8000), "a"), "max_tokens": 1}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: httpx.post(chat, json=request, headers=headers, timeout=60), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert memory(pid) - before < 2**29


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "99999"], "127.0.0.1:99999 cannot be served: ports are 0..65535"),
        (["--schedule", "some"], "unknown schedule 'some': write own, dense, paper, tokens-N, or LAYERS:RATIOS"),
        (["--schedule", "tokens-1"], "a budget of 1 average tokens cannot be met"),
        (["--schedule", "9:0.5"], "drop after layer 9 in a decoder of 8 layers"),
        (["--schedule", "4:0.5,0.2"], "1 drop layers [4] but 2 ratios"),
        (["--image-hosts", "http://a.org"], "'http://a.org' is no host"),
        (["--slots", "0"], "slots must be at least 1, got 0"),
        (["--max-new-tokens", "512"], "max_new_tokens is 512, but the model has 512 positions"),
        (["no/such/model"], "no/such/model"),
    ],
    ids=str,
)
def test_servers_that_cannot_be(fails, options, words):
    assert words in fails("serve", *options)


def test_a_port_is_taken(fails):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert (
            fails("serve", "--port", port) == f"pdrop serve: 127.0.0.1:{port} cannot be served: Address already in use"
        )
