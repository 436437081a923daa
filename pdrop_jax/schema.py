"""Dictionaries from files as dataclasses, every value checked for its type and range (by pydantic).

A dataclass declares its ranges where it declares its fields::

    hidden_size: Annotated[int, Field(ge=1, le=2**16)] = 4096
"""

import dataclasses
import difflib
import functools
import json
import typing
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from pdrop_jax.errors import UserError

T = TypeVar("T")

SHOWN = 60  # characters of a value in a message

# Finite, unlike a float without it: JSON and TOML both can say NaN and infinity.
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def validated(kind: type[T], data: Any, where: str) -> T:
    """``data`` of a JSON or TOML file as ``kind``, a dataclass or a pydantic model. Nothing is converted.

    Args:
      where: what the error message calls the file.

    Raises:
      UserError: one line with the file, the key, its value and what is allowed.
    """
    adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]
    try:
        # As JSON because there a list may be a tuple in strict mode too.
        return adapter.validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise UserError(_message(error, kind, where)) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _message(error: ValidationError, kind: type, where: str) -> str:
    found = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in found["loc"])
    if found["type"] in ("missing", "missing_argument"):
        return f"{where} has no {key}"
    if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where} has an unknown key {key}{_suggestion(kind, found['loc'])}"
    if found["type"] == "value_error":  # raised by a __post_init__
        return f"{where}: {found['ctx']['error']}"
    value = found["input"]
    shown = json.dumps(value) if not isinstance(value, str) else repr(value)
    shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"
    allowed = found["msg"].removeprefix("Input should be ").replace("a valid tuple", "a list")
    return f"{where}: {key or 'the document'} is {shown}, it must be {allowed}"


def _suggestion(kind: Any, loc: tuple[int | str, ...]) -> str:
    """``: did you mean …?`` with the known key that is nearest to the last part of ``loc``."""
    for part in loc[:-1]:
        hints = typing.get_type_hints(kind)
        kind = hints.get(str(part), kind)
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    near = difflib.get_close_matches(str(loc[-1]), names, 1, 0.5)
    if not near:
        return f": known are {', '.join(names)}" if names else ""
    return f": did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?"
