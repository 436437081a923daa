"""Images inside text: base64, and ``data:`` URLs."""

import base64
import binascii
from typing import Any

from pdrop_jax.errors import UserError


def is_data_url(text: object) -> bool:
    return isinstance(text, str) and text[:5].lower() == "data:"


def read_data_url(url: str, where: str) -> bytes:
    """The content of ``data:image/png;base64,…``.

    Args:
      where: what the message of an error begins with.

    Raises:
      UserError: the URL has another form.
    """
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(f"{where} has a data: URL that is not of the form data:image/png;base64,…")
    return read_base64(data, where)


def read_base64(data: Any, where: str) -> bytes:
    """The bytes of base64; raises UserError as ``read_data_url``."""
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise UserError(f"{where} has an image that is not valid base64") from None
