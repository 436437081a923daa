"""Images inside text: ``data:`` URLs."""

import base64
import binascii
from typing import Any

from pdrop_jax.errors import UserError


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
