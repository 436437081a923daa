"""The exception for mistakes that a user can fix, and printing of untrusted text."""

import contextlib
import re
import sys
from collections.abc import Iterator

# C0 and C1 controls, DEL, line and paragraph separators, bidirectional controls, and lone surrogates, in which Python
# keeps bytes that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


class UserError(ValueError):
    """Something that the caller can fix.

    The first argument is one line: what is wrong, the numbers, what to do. Further arguments are listed below it.
    """

    def __str__(self) -> str:
        return "\n  ".join(map(str, self.args))


def printable(text: object, keep: str = "") -> str:
    """``text`` with control characters as visible escapes, so that it cannot control a terminal or fake a line.

    The escapes are JSON's, so a JSON document keeps its meaning.

    Args:
      keep: control characters to leave alone, such as ``"\\n\\t"`` in an answer.
    """

    def escaped(found: re.Match[str]) -> str:
        character = found[0]
        return character if character in keep else _SHORT.get(character, f"\\u{ord(character):04x}")

    return _UNSAFE.sub(escaped, str(text))


def one_line(error: BaseException, most: int | None = None) -> str:
    """What another library's error says, on one line of at most ``most`` characters; its type if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def error_text(error: Exception) -> str:
    """The printed form of an error: one line, followed by the list of a UserError that has one."""
    lines = error.args if isinstance(error, UserError) else (error,)
    return "\n  ".join(map(printable, lines))


@contextlib.contextmanager
def exit_on_error(prefix: str = "") -> Iterator[None]:
    """The context of every command: a UserError, a full disk or a missing permission becomes a line and exit code 2."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"{prefix}{error_text(error)}", file=sys.stderr)
        sys.exit(2)
