"""Arrays in a bucket: how orbax is told to reach it.

orbax writes to gs:// through TensorStore's own client, but not to s3://, for which TensorStore has one too: orbax takes
such a URL for a relative path. The three functions below, which turn a URL into TensorStore's description of a store,
are therefore replaced by ours. They also set how often a failed request is repeated; TensorStore's default is 32 times,
about a quarter of an hour. Everything else, such as the format and the order of writes, stays orbax's.
"""

import functools
import os
import posixpath
from typing import Any

from orbax.checkpoint import v1 as ocp

from pdrop_jax.paths import RETRIES, in_bucket

PAUSE = 0.5  # seconds before the first repetition of a request; each further one waits twice as long
FILE_BYTES = 256 * 2**20  # size at which orbax begins another object; it is buffered in memory


def orbax_path(path: os.PathLike) -> str:
    """``path`` as orbax takes it."""
    if in_bucket(path):
        _reach_buckets()
        return os.fspath(path)
    return os.path.abspath(path)


def orbax_context(path: os.PathLike, **settings: Any) -> ocp.Context:
    """Settings for reading and writing at ``path``. In a bucket, the last object that is written commits the others."""
    context = ocp.Context(**settings)
    if in_bucket(path):
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        context.array.saving.ocdbt_target_data_file_size = FILE_BYTES
    return context


@functools.cache
def _reach_buckets() -> None:
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    normalize = tensorstore_utils._normalize_path
    tensorstore_utils._use_gcs_driver = in_bucket
    tensorstore_utils._normalize_path = lambda path: os.fspath(path) if in_bucket(path) else normalize(path)
    gcs_utils.get_kvstore_for_gcs = _store


def _store(url: str) -> dict[str, Any]:
    """TensorStore's description of the store at ``url``."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    retries = {"max_retries": RETRIES, "initial_delay": f"{PAUSE}s", "max_delay": "16s"}
    where = {"bucket": bucket, "path": posixpath.normpath(path)}
    if scheme == "gs":
        return {"driver": "gcs", **where, "gcs_request_retries": retries}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {
        "driver": "s3",
        **where,
        "s3_request_retries": retries,
        # Otherwise AWS's library looks for files first and complains on stderr that there are none.
        "aws_credentials": {"type": "environment" if "AWS_ACCESS_KEY_ID" in os.environ else "default"},
        **({"aws_region": region} if region else {}),
        **({"endpoint": endpoint} if endpoint else {}),
    }
