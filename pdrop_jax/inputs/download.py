"""Images at http(s) URLs, fetched within limits, and only from addresses that may be asked.

Whoever writes a URL decides where this machine connects to. So each address is checked after its name has been
resolved, right where the connection is made, and again at each redirect: private networks, this machine itself and the
metadata services of clouds are out of reach unless they are listed.
"""

import contextlib
import dataclasses
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpcore
import httpx

from pdrop_jax.errors import UserError, one_line, printable

REDIRECTS = 3
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses in IPv6
SHOWN = 80  # characters of a URL in an error message
HEADERS: dict[bytes | str, bytes | str] = {
    "User-Agent": "pdrop-jax",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
}


@dataclasses.dataclass(frozen=True)
class DownloadRules:
    """What may be downloaded.

    Attributes:
      hosts: names ("images.example.org", or "*.example.org" for all below it), addresses and networks ("10.0.0.0/8")
        that may be asked; None is every public address. An address that is not public has to be listed itself.
      max_bytes: largest size of an image file.
      seconds: time limit of a download with its redirects. Resolving the name counts, but is not interrupted.
    """

    hosts: tuple[str, ...] | None = None
    max_bytes: int = 2**25
    seconds: float = 20

    def __post_init__(self) -> None:
        for host in self.hosts or ():
            if "://" in host or (_network(host) is None and ("/" in host or ":" in host or not host.strip("*."))):
                raise UserError(
                    f"{host!r} is no host: write a name, *.NAME, an address or a network such as 10.0.0.0/8"
                )


def is_http_url(source: Any) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def download(url: str, where: str, rules: DownloadRules = DownloadRules()) -> bytes:
    """The contents of an http(s) URL.

    Raises:
      UserError: it starts with ``where``. The URL is malformed, its host or a host that it redirects to is not allowed,
        it cannot be fetched, or the file is too large or takes too long.
    """
    deadline = time.monotonic() + rules.seconds
    with _one_line_errors(f"{where}, {printable(url[:SHOWN])}{'…' if url[SHOWN:] else ''},", rules):
        for _ in range(REDIRECTS + 1):
            place = httpx.URL(url)
            if place.scheme not in ("http", "https") or not place.host:
                raise UserError("is no http(s) URL")
            with httpcore.ConnectionPool(network_backend=_Backend(rules, deadline)) as pool:
                target = str(place.copy_with(fragment=None))
                with pool.stream("GET", target, headers={**HEADERS, "Host": place.netloc.decode("ascii")}) as response:
                    headers = {name.lower(): value for name, value in response.headers}
                    if response.status not in (301, 302, 303, 307, 308):
                        return _body(response, headers, rules)
                    url = str(place.join(headers.get(b"location", b"").decode("latin-1")))
        raise UserError(f"redirects more than {REDIRECTS} times")


def _body(response: httpcore.Response, headers: dict[bytes, bytes], rules: DownloadRules) -> bytes:
    if response.status != 200:
        raise UserError(f"was answered with status {response.status}")
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise UserError("was sent compressed, which was not asked for")
    content = bytearray()
    for piece in response.iter_stream():
        content += piece
        if len(content) > rules.max_bytes:
            raise UserError(f"has more than {rules.max_bytes:,} bytes: make the image smaller")
    return bytes(content)


@contextlib.contextmanager
def _one_line_errors(where: str, rules: DownloadRules) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{where} {error}") from None
    except httpcore.TimeoutException:
        raise UserError(f"{where} was not there within {rules.seconds:g} seconds") from None
    except (httpx.InvalidURL, UnicodeError):
        raise UserError(f"{where} is a malformed URL") from None
    except (
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.UnsupportedProtocol,
        ssl.SSLError,
        OSError,
    ) as error:
        raise UserError(f"{where} cannot be fetched: {one_line(error, 100)}") from None


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text.strip("[]"), strict=False)
    except ValueError:
        return None


def _addresses(host: str, port: int, rules: DownloadRules) -> list[str]:
    """Addresses of ``host`` that may be asked. Raises UserError if there is none."""
    listed = [network for network in map(_network, rules.hosts or ()) if network]
    names = [name.lower().rstrip(".") for name in rules.hosts or () if _network(name) is None]
    name = host.lower().rstrip(".")
    named = rules.hosts is None or any(
        name == known or (known.startswith("*.") and name.endswith(known[1:])) for known in names
    )
    if not named and _network(host) is None and not listed:
        raise UserError("is at a host that is not allowed")  # nothing is resolved for it
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise UserError("is at a host that cannot be found" if named else "is at a host that is not allowed") from None
    allowed = [text for text in sorted(found) if _allowed(ipaddress.ip_address(text.split("%")[0]), named, listed)]
    if not allowed:
        raise UserError("is at an address that is not public" if named else "is at a host that is not allowed")
    return allowed


def _allowed(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
    named: bool,
    listed: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network],
) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None
        address = address.ipv4_mapped or address.sixtofour or inside or address
    if any(address.version == network.version and address in network for network in listed):
        return True
    return named and address.is_global and not address.is_multicast


class _Backend(httpcore.NetworkBackend):
    """Connects to checked addresses only, and lets nothing take longer than until ``deadline``."""

    def __init__(self, rules: DownloadRules, deadline: float) -> None:
        self._rules, self._deadline = rules, deadline

    def connect_tcp(
        self, host: str, port: int, timeout: Any = None, local_address: Any = None, socket_options: Any = None
    ) -> httpcore.NetworkStream:
        address = _addresses(host, port, self._rules)[0]
        stream = httpcore.SyncBackend().connect_tcp(address, port, _left(self._deadline), local_address, socket_options)
        return _Stream(stream, self._deadline)


class _Stream(httpcore.NetworkStream):
    """A stream whose operations together take no longer than until ``deadline``."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: Any = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: Any = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: Any = None, timeout: Any = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _Stream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left
