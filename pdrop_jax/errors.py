"""The one exception for mistakes a user can make, and how text from elsewhere is shown on a terminal."""

import contextlib
import re
import sys
from collections.abc import Iterator

# C0 and C1 controls, DEL, line and paragraph separators, what turns the direction of writing, half surrogate pairs: the
# last are how Python holds bytes that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


class UserError(ValueError):
    """Something the caller can put right.

    The first argument is one line: what is wrong, the numbers, what to do. Others are lines of a list below it.
    """

    def __str__(self) -> str:
        return "\n  ".join(map(str, self.args))


def printable(text: object, keep: str = "") -> str:
    """``text`` with control characters as visible escapes, so that it cannot steer a terminal or forge a line.

    The escapes are JSON's: a JSON document stays the same document.

    Args:
      keep: control characters that stay, such as ``"\\n\\t"`` in an answer.
    """

    def escaped(found: re.Match[str]) -> str:
        character = found[0]
        return character if character in keep else _SHORT.get(character, f"\\u{ord(character):04x}")

    return _UNSAFE.sub(escaped, str(text))


def error_text(error: Exception) -> str:
    """What is printed of an error: one line, and below it the others of a UserError that lists some."""
    lines = error.args if isinstance(error, UserError) else (error,)
    return "\n  ".join(map(printable, lines))


@contextlib.contextmanager
def exit_on_error(prefix: str = "") -> Iterator[None]:
    """What every command runs in: a UserError, a full disk, a folder without permission are a line and exit code 2."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"{prefix}{error_text(error)}", file=sys.stderr)
        sys.exit(2)
