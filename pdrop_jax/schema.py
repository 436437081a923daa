"""Dictionaries from files as dataclasses, with the type and range of every value checked by pydantic.

A dataclass declares ranges beside its fields::

    hidden_size: Annotated[int, Field(ge=1, le=2**16)] = 4096
"""

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pdrop_jax.errors import UserError

T = TypeVar("T")

SHOWN = 60  # characters of a value in an error message

NO_OTHER_KEYS = ConfigDict(extra="forbid")  # as ``__pydantic_config__`` of a dataclass

# JSON and TOML can both express NaN and infinity, which a plain float would accept.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NormEps = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

# Ranges that the configs of models are checked for: far beyond any model, but small enough to compute shapes.
Width = Annotated[int, Field(ge=1, le=2**20)]
Heads = Annotated[int, Field(ge=1, le=2**14)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
Positions = Annotated[int, Field(ge=1, le=2**27)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
TokenId = Annotated[int, Field(ge=0, lt=2**24)]
RopeBase = Annotated[float, Field(gt=0, le=1e12)]


def validated(kind: type[T], data: Any, where: str, prefix: str = "") -> T:
    """``data`` from a JSON or TOML file as ``kind``, a dataclass or a pydantic model. Types are not converted.

    Args:
      where: how the error message refers to the file.
      prefix: prefix of the keys in the error message, for a table inside the file.

    Raises:
      UserError: one line with the file, the key, its value and what is allowed.
    """
    adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]
    try:
        # As JSON, because only there strict mode accepts a list for a tuple.
        return adapter.validate_json(json.dumps(data, default=str), strict=True)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
    except ValidationError as error:
        raise UserError(error_line(error, kind, data, where, prefix)) from None
    except ValueError:  # Python does not print an integer of thousands of digits, which TOML can express in hexadecimal
        raise UserError(f"{where} is malformed: a number has too many digits") from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def error_line(error: ValidationError, kind: type, data: Any, where: str, prefix: str = "") -> str:
    """One line about the first thing that is wrong with ``data``; arguments are those of ``validated``."""
    errors = error.errors(include_url=False)
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    # An unknown key comes first: where a key is misspelt, the right one is missing as well.
    found = next((x for x in errors if x["type"] in unknown), errors[0])
    key = prefix + ".".join(_keys(found["loc"], data))
    if found["type"] == "json_invalid":  # it is well-formed, since it was serialized above
        reason = "is nested too deeply" if "recursion" in found["msg"] else "has a string that is not valid UTF-8"
        return f"{where} {reason}"
    if found["type"] in ("missing", "missing_argument"):
        missing = [prefix + ".".join(_keys(x["loc"], data)) for x in errors if x["type"] == found["type"]]
        return f"{where} has no {', '.join(missing)}"
    if found["type"] in unknown:
        return f"{where} has an unknown key {key}{_suggestion(kind, found['loc'])}"
    if found["type"] == "union_tag_invalid":
        known = found["ctx"]
        key = f"{key}.{known['discriminator'][1:-1]}"
        return f"{where}: {key} is {known['tag']!r}, it must be one of {known['expected_tags']}"
    if found["type"] == "union_tag_not_found":
        return f"{where} has no {key}.{found['ctx']['discriminator'][1:-1]}"
    if found["type"] == "value_error":  # raised by a __post_init__
        return f"{where}: {found['ctx']['error']}"
    value = found["input"]
    shown = repr(value) if isinstance(value, str) else json.dumps(value)
    shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"
    allowed = re.sub(r"^\w+ should | after validation, not \d+$", "", found["msg"]).replace("valid array", "list")
    return f"{where}: {key or 'the document'} is {shown}, it must {allowed}"


def _keys(loc: Iterable[int | str], data: Any) -> Iterator[str]:
    """The parts of ``loc`` that are keys of ``data`` or missing from it; pydantic also adds the members of a union."""
    parts = list(loc)
    for number, part in enumerate(parts, 1):
        if isinstance(data, dict):
            if part not in data and (str(part)[:1].isupper() or number < len(parts)):
                continue
            data = data.get(str(part))
        elif isinstance(data, list | tuple) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return
        yield str(part)


def _suggestion(kind: Any, loc: tuple[int | str, ...]) -> str:
    """``: did you mean …?`` with the known key closest to the last part of ``loc``."""
    for part in loc[:-1]:
        if isinstance(part, int):  # in a list
            kind = next(iter(typing.get_args(kind)), None)
            continue
        if not isinstance(kind, type):  # a union: the name of the member that was meant comes next, if it is known
            kind = next((member for member in typing.get_args(kind) if getattr(member, "__name__", "") == part), None)
            if kind is None:
                return ""
            continue
        hints = typing.get_type_hints(kind)
        kind = hints.get(str(part), kind)
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    near = difflib.get_close_matches(str(loc[-1]), names, 1, 0.5)
    if not near:
        return f": known are {', '.join(names)}" if names else ""
    path = [str(part) for part in loc[:-1] if not str(part)[:1].isupper()]
    return f": did you mean {'.'.join([*path, near[0]])}?"
