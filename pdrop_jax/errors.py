"""The one exception for mistakes a user can make; a command prints it as one line and exits 2."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Something the caller can put right. The message is one line: what is wrong, the numbers, what to do."""


@contextlib.contextmanager
def exit_on_error(prefix: str = "") -> Iterator[None]:
    """What every command runs in: a UserError, a full disk, a folder without permission are a line and exit code 2."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"{prefix}{error}", file=sys.stderr)
        sys.exit(2)
