"""The server's process: from its socket to the last answer after SIGTERM."""

import os
import socket
import sys
from types import FrameType

import uvicorn

from pdrop_jax.errors import UserError
from pdrop_jax.serve.app import create_app
from pdrop_jax.serve.service import Service

KEY = "PDROP_API_KEY"  # the environment variable
# Seconds that an idle connection is kept open: longer than clients and load balancers keep theirs (5 s in httpx, 60 s
# at Amazon, 600 s at Google). Otherwise a request sent just as the server closes the connection is lost.
KEEP_ALIVE_SECONDS = 620


class Server(uvicorn.Server):
    """Ends once all requests are answered, when SIGTERM or SIGINT has come; at once with the second signal."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit = self._service.state == "stopping"
        self._service.state = "stopping"

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        state, idle = self._service.state, self._service.active == 0
        self.should_exit = self.should_exit or state == "failed" or (state == "stopping" and idle)
        return await super().on_tick(counter)


def serve(service: Service, host: str, port: int, api_key: str | None) -> int:
    """Serves until a signal comes, and returns the exit code.

    Raises:
      UserError: the port is taken or the address is not this machine's.
    """
    listening = bind(host, port)
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        print(f"note: whoever reaches {host} may ask: set {KEY} to require an API key", file=sys.stderr)
    print(f"serving {service.name} on http://{host}:{listening.getsockname()[1]}", file=sys.stderr, flush=True)
    app = create_app(service, api_key)
    settings = uvicorn.Config(app, log_level="warning", server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS)
    server = Server(settings, service)
    server.run(sockets=[listening])
    if service.compiling:  # XLA cannot be interrupted, and a process that ends while it runs may crash
        sys.stderr.flush()
        os._exit(0)
    return int(service.state == "failed")


def bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "ports are 0..65535"
        raise UserError(f"{host}:{port} cannot be served: {reason}") from None
