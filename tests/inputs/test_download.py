"""Images at http(s) URLs: where the library may connect to. Downloads: serve/test_bad_requests.py."""

import http.server
import threading

import pytest

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.download import DownloadRules, download, is_http_url
from pdrop_jax.inputs.images import open_image

PRIVATE = [
    "http://127.0.0.1/a.png",
    "http://localhost/a.png",
    "http://2130706433/a.png",  # 127.0.0.1 as a number
    "http://[::1]/a.png",
    "http://[::ffff:10.0.0.1]/a.png",
    "http://[64:ff9b::a9fe:a9fe]/a.png",  # 169.254.169.254 behind NAT64
    "http://[2002:a00:1::]/a.png",  # 10.0.0.1 by 6to4
    "http://169.254.169.254/latest/meta-data",
    "http://10.1.2.3/a.png",
    "https://192.168.0.1/a.png",
    "http://0.0.0.0/a.png",
    "http://224.0.0.1/a.png",
]


@pytest.mark.parametrize("url", PRIVATE)
def test_the_library_connects_to_public_addresses_only(url):
    with pytest.raises(
        UserError, match=rf"^the picture, {url.replace('[', '.').replace(']', '.')}, is at an address tha"
    ):
        open_image(url)


@pytest.fixture
def port():
    """Of a server that answers each request with its path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"{self.headers['Host']} {self.path}".encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("hosts", "allowed"),
    [
        (("localhost", "127.0.0.0/8"), True),
        (("127.0.0.1",), True),  # whatever name leads there
        (("LOCALHOST.", "127.0.0.1"), True),
        (("localhost",), False),  # not public, and not listed itself
        (("*.localhost", "10.0.0.0/8"), False),
        (("host",), False),
        ((), False),
    ],
    ids=str,
)
def test_hosts_are_listed_by_name_and_private_ones_by_address(port, hosts, allowed):
    rules, url = DownloadRules(hosts), f"http://localhost:{port}/a%20b.png?c#d"
    if allowed:
        assert download(url, "it", rules) == f"localhost:{port} /a%20b.png?c".encode()
    else:
        with pytest.raises(UserError, match=r"is at a host that is not allowed|is at an address that is not public"):
            download(url, "it", rules)


def test_a_server_that_speaks_no_tls(port):
    with pytest.raises(UserError, match="cannot be fetched"):
        download(f"https://localhost:{port}/", "it", DownloadRules(("localhost", "127.0.0.1", "::1")))


@pytest.mark.parametrize(
    "source", ["a.png", "ftp://a.org/a.png", "data:image/png;base64,", b"http://a.org", None, "http:a"]
)
def test_what_is_no_http_url(source):
    assert not is_http_url(source)


@pytest.mark.parametrize("host", ["http://a.org", "a.org/b", "a.org:80", "*", ""])
def test_hosts_that_are_none(host):
    with pytest.raises(UserError, match="is no host: write a name"):
        DownloadRules((host,))
