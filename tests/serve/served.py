"""A server in this process, and what its clients send."""

import base64
import contextlib
import pathlib
import threading

import uvicorn

from pdrop_jax.serve.app import create_app
from pdrop_jax.serve.lifecycle import Server, bind

KEY = "key-of-the-tests"
GRID = pathlib.Path(__file__).parents[2] / "examples/grid.png"
PICTURE = "data:image/png;base64," + base64.b64encode(GRID.read_bytes()).decode()
SLOTS, WAITING, LONGEST = 3, 14, 36


def said(*contents):
    """The messages of a question: URLs of images, then text."""
    *urls, text = contents
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


@contextlib.contextmanager
def serving(service, **options):
    """The URL of a server in a thread."""
    listening = bind("127.0.0.1", 0)
    server = Server(uvicorn.Config(create_app(service, **options), log_level="critical"), service)
    thread = threading.Thread(target=server.run, args=[[listening]])
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        service.state = "stopping"
        thread.join(60)
        assert not thread.is_alive()
