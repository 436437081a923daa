"""Whatever a client sends, it gets one line, and nothing of the server's."""

import base64
import contextlib
import http.server
import socket
import threading
import time
import zlib
from pathlib import Path

import httpx
import pytest
from served import GRID, KEY, PICTURE, WAITING, said

import pdrop_jax

LONG = {"regex": "[a-z ]{500}"}  # an answer as long as answers can be


def asks(*contents, **fields):
    return {"model": "tiny", "messages": said(*contents), **fields}


def shown(mode):
    (message,) = said(PICTURE, "a")
    message["content"][0]["mode"] = mode
    return {"model": "tiny", "messages": [message]}


def image(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def bomb():
    """The header of a PNG of 30,000 x 3,000 pixels."""
    ihdr = b"IHDR" + (30_000).to_bytes(4) + (3_000).to_bytes(4) + bytes([8, 2, 0, 0, 0])
    chunk = len(ihdr[4:]).to_bytes(4) + ihdr + zlib.crc32(ihdr).to_bytes(4)
    return b"\x89PNG\r\n\x1a\n" + chunk + bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4)


@pytest.fixture(scope="module")
def pictures():
    """The port of a server of images that also redirects, sends without end and is slow."""
    waiting = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):  # the client has heard enough
                getattr(self, self.path.strip("/").replace(".", "_"))()

        def send(self, content, status=200, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def grid_png(self):
            self.send(GRID.read_bytes())

        def moved(self):
            self.send(b"", 302, Location="/grid.png")

        def elsewhere(self):
            self.send(b"", 302, Location="http://127.0.0.2/grid.png")

        def file(self):
            self.send(b"", 302, Location="file:///etc/passwd")

        def round(self):
            self.send(b"", 302, Location="/round")

        def endless(self):
            self.send(b"")
            while True:
                self.wfile.write(bytes(2**16))

        def dripping(self):
            self.send(b"")
            while not waiting.wait(0.1):
                self.wfile.write(b"a")

        def packed(self):
            self.send(b"", Content_Encoding="gzip")

        def missing(self):
            self.send(b"", 404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    yield server.server_address[1]
    waiting.set()
    server.shutdown()
    server.server_close()


CASES = {
    "no JSON": (b"{", "malformed: Invalid JSON"),
    "deep": (b'{"messages":' + b"[" * 9999, "malformed: Invalid JSON: recursion limit"),
    "not UTF-8": (b'{"messages": "\xff"}', "malformed: Invalid JSON"),
    "a list": (b"[]", "must be an object"),
    "no messages": ({}, "the request has no messages"),
    "no message": ({"messages": []}, "messages is [], it must have at least 1 item"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role is 'tool', it must be 'system'"),
    "content": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "content.0.type is 'audio'"),
    "order": ({"messages": [*said("a"), *said("b")]}, "message 2 is from 'user', expected 'assistant'"),
    "tag": (asks("<image>"), "1 <image> tag but 0 pictures"),
    "temperature": (asks("a", temperature=-1), "temperature must be 0 (greedy) or in"),
    "a number as text": (asks("a", temperature="1"), "temperature is '1', it must be a valid number"),
    "top_p": (asks("a", top_p=2), "top_p must be greater than 0 and at most 1"),
    "n": (asks("a", n=17), "n is 17, it must be less than or equal to 16"),
    "max_tokens": (asks("a", max_tokens=10**9), "max_tokens is 1,000,000,000, but this server answers in at most"),
    "no tokens": (asks("a", max_tokens=0), "max_new_tokens must be at least 1"),
    "stop": (asks("a", stop=""), "stop is '', it must have at least 1 character"),
    "top_logprobs": (asks("a", logprobs=True, top_logprobs=21), "top_logprobs is 21"),
    "tools": (asks("a", tools=[{"type": "function"}]), "tools is not supported"),
    "penalty": (asks("a", frequency_penalty=1), "frequency_penalty is not supported"),
    "budget": (asks("a", pdrop="tokens-1"), "no budget 'tokens-1': this server has own, dense"),
    "regex": (asks("a", regex="("), "the schema or regex cannot be used"),
    "schema": (
        asks("a", response_format={"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}),
        "cannot be used: Invalid type: strange",
    ),
    "two constraints": (asks("a", regex="a", response_format={"type": "json_object"}), "pass one of them"),
    "long": (asks("a " * 400), "text tokens"),
    "path": (asks(str(GRID), "a"), "images are data: or http(s) URLs"),
    "file URL": (asks(f"file://{GRID}", "a"), "images are data: or http(s) URLs"),
    "file in a list": (
        {"messages": [{"role": "user", "content": [{"type": "image", "path": str(GRID)}]}]},
        "content.0.type is 'image', it must be one of",
    ),
    "frames": (asks("a") | {"messages": said(f"file://{GRID}", "a")}, "images are data: or http(s) URLs"),
    "bucket": (asks("gs://bucket/a.png", "a"), "images are data: or http(s) URLs"),
    "mode": (shown("still"), "image_url.mode is 'still', it must be 'focus' or 'standby'"),
    "standby": (shown("standby"), 'mode "standby" needs a model with standby tokens'),
    "three images": (asks(PICTURE, PICTURE, PICTURE, "a"), "has 3 images, but this server takes at most 2"),
    "no image": (asks(image(b"text"), "a"), "messages.0.content.0: cannot be read as a picture"),
    "bomb": (asks(image(bomb()), "a"), "pixels"),
    "base64": (asks("data:image/png;base64,%%", "a"), "is not valid base64"),
    "postscript": (asks(image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "a"), "PostScript"),
    "host": (asks("http://images.invalid/a.png", "a"), "is at a host that is not allowed"),
    "this machine": (asks("http://127.0.0.2/a.png", "a"), "is at a host that is not allowed"),
    "metadata": (asks("http://169.254.169.254/latest/meta-data", "a"), "is at a host that is not allowed"),
    "mapped": (asks("http://[::ffff:127.0.0.2]/a.png", "a"), "is at a host that is not allowed"),
    "no URL": (asks("http://", "a"), "is no http(s) URL"),
    "redirect": (asks("http://127.0.0.1:PORT/elsewhere", "a"), "is at a host that is not allowed"),
    "redirect to a file": (asks("http://127.0.0.1:PORT/file", "a"), "is no http(s) URL"),
    "redirects": (asks("http://127.0.0.1:PORT/round", "a"), "redirects more than 3 times"),
    "endless": (asks("http://127.0.0.1:PORT/endless", "a"), "has more than 1,048,576 bytes"),
    "dripping": (asks("http://127.0.0.1:PORT/dripping", "a"), "was not there within 0.5 seconds"),
    "packed": (asks("http://127.0.0.1:PORT/packed", "a"), "was sent compressed"),
    "missing": (asks("http://127.0.0.1:PORT/missing", "a"), "was answered with status 404"),
    "nobody": (asks("http://127.0.0.1:1/a.png", "a"), "cannot be fetched"),
}


def message_of(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    assert "Traceback" not in answer.text
    assert str(Path(pdrop_jax.__file__).parent) not in answer.text  # GRID's own path is in the request
    return error["message"]


@pytest.mark.parametrize("case", CASES)
def test_bad_requests_get_one_line(post, pictures, case):
    body, words = CASES[case]
    headers = {"Content-Type": "application/json"}
    if isinstance(body, bytes):
        answer = post(content=body, headers=headers)
    else:
        text = httpx.Request("POST", "http://x", json=body).content.replace(b"PORT", str(pictures).encode())
        answer = post(content=text, headers=headers)
    assert words in message_of(answer, 400)


def test_an_image_is_downloaded_from_a_host_that_is_listed(post, pictures):
    here = f"http://127.0.0.1:{pictures}"
    texts = [
        post(json=asks(url, "What is in row 1?", temperature=0)).json()["choices"][0]["message"]["content"]
        for url in (PICTURE, f"{here}/grid.png", f"{here}/moved")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_other_errors(post, url):
    assert "no model 'other'" in message_of(post(json=asks("a", model="other")), 404)
    assert "JSON" in message_of(post(content=b"a=b", headers={"Content-Type": "text/plain"}), 415)
    assert "more than 4,194,304 bytes" in message_of(post(json=asks("a" * 2**22)), 413)
    stream = (bytes(2**20) for _ in range(5))  # of no stated length
    assert "more than" in message_of(post(content=stream, headers={"Content-Type": "application/json"}), 413)
    assert message_of(httpx.get(f"{url}/v1/nothing"), 404) == "Not Found"
    assert message_of(httpx.get(f"{url}/../../cli/serve.py"), 404)
    assert message_of(httpx.get(f"{url}/%2e%2e/app.py"), 404)


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}])
def test_without_the_key_nothing_is_answered(url, given):
    for method, path in [("POST", "/v1/chat/completions"), ("GET", "/v1/models")]:
        answer = httpx.request(method, f"{url}{path}", headers=given)
        assert message_of(answer, 401) == "the API key is missing or wrong"
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_full_queue_is_429(post, service, idle):
    """None of the answers that were queued for the refused request goes on."""
    idle()
    answers, engine = [], service.engines["own"]
    first = threading.Thread(target=lambda: answers.append(post(json=asks("a", n=WAITING - 1, **LONG))))
    with engine._turn:  # until then nothing leaves the queue
        first.start()
        until = time.monotonic() + 60
        while engine.waiting < WAITING - 1:
            assert time.monotonic() < until
            time.sleep(0.001)
        refused = post(json=asks("a", n=16, **LONG))
    assert message_of(refused, 429).startswith(f"{WAITING} requests wait already")
    assert refused.headers["Retry-After"] == "1"
    first.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["choices"]) == WAITING - 1
    idle()


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_vanishes_is_cancelled(service, url, idle, stream):
    idle()
    counted = service.metrics._answers.labels("own", "cancelled")._value
    before, port = counted.get(), int(url.rpartition(":")[2])
    body = f'{{"messages": [{{"role": "user", "content": "a"}}], "n": 12, "regex": "[a-z ]*", "stream": {stream}}}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        while not service.engines["own"].running:
            pass
    idle()
    assert counted.get() > before
