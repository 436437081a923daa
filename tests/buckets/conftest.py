"""Buckets of two storage servers that run on this machine."""

import contextlib
import itertools
import logging
import os

import pytest
from servers import Proxy, environment, google_storage, make_bucket, s3

from pdrop_jax.paths import as_path

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def servers():
    """The two servers, behind proxies that can fail requests. All clients are told to use them."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    before = dict(os.environ)
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(Proxy(start(stack))) for start in (google_storage, s3)]
        os.environ.update(environment(*(proxy.url for proxy in found)))
        yield dict(zip(("gs", "s3"), found, strict=True))
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def name(servers):
    """Name of a new bucket on both servers."""
    name = f"bucket-{next(NUMBERS)}"
    make_bucket(name, *(proxy.url for proxy in servers.values()))
    yield name
    for proxy in servers.values():
        proxy.reset()


@pytest.fixture(params=["gs", "s3"])
def bucket(request, name):
    """A new bucket."""
    return as_path(f"{request.param}://{name}")


@pytest.fixture
def server(servers, bucket):
    """The server of ``bucket``."""
    return servers[bucket.parts[1]]
