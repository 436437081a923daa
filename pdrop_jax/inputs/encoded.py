"""Images named by a URL: ``data:`` URLs, which contain them, and http(s) URLs."""

import base64
import binascii
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.download import download, is_http_url


def is_url(source: Any) -> bool:
    """Whether ``read_url`` reads it."""
    return is_data_url(source) or is_http_url(source)


def read_url(url: str, where: str) -> bytes:
    """The contents of a ``data:`` or http(s) URL. Raises UserError, which names ``where``; see ``download``."""
    return decode_data_url(url, where) if is_data_url(url) else download(url, where)


def is_data_url(source: Any) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def decode_data_url(url: str, where: str) -> bytes:
    """The contents of a ``data:`` URL. Raises UserError, which names ``where``, if it is malformed."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(f"{where} has a data: URL that is not of the form data:image/png;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{where} has an image that is not valid base64") from None
