"""Buckets of two storage servers that run on this machine."""

import contextlib
import itertools
import logging
import os

import pytest
from servers import environment, google_storage, make_bucket, s3

from pdrop_jax.paths import as_path

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def urls():
    """URLs of the two servers."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    before = dict(os.environ)
    with contextlib.ExitStack() as stack:
        found = google_storage(stack), s3(stack)
        os.environ.update(environment(*found))
        yield found
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def name(urls):
    """Name of a new bucket on both servers."""
    name = f"bucket-{next(NUMBERS)}"
    make_bucket(name, *urls)
    return name


@pytest.fixture(params=["gs", "s3"])
def bucket(request, name):
    """A new bucket."""
    return as_path(f"{request.param}://{name}")
