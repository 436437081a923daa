"""Calls of huggingface_hub: repeated when that may help, and otherwise one line that says what to do."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pdrop_jax.errors import UserError

DOWNLOADED = "downloaded"
ATTEMPTS = 4  # of a request with transient errors, of which the client itself repeats only some
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
TRANSIENT_ERRORS = ("ReadError", "ReadTimeout", "RemoteProtocolError", "WriteError", "WriteTimeout")  # of httpx
Result = TypeVar("Result")


def ask(name: str, request: Callable[[], Result], doing: str = DOWNLOADED, bars: bool = False) -> Result:
    """The result of ``request``, a call of huggingface_hub, repeated after transient errors.

    Args:
      name: the model, for messages.
      doing: what could not be done to it, likewise.
      bars: show the client's progress bars on a terminal.

    Raises:
      UserError: whatever went wrong, in one line with what to do.
      OSError: the disk is full or not writable.
    """
    for attempt in range(ATTEMPTS):
        try:
            with _quiet(bars):
                return request()
        except Exception as error:  # the client raises exceptions of many libraries
            if isinstance(error, OSError) and error.errno:
                raise
            cause = _cause_of(error)
            if attempt == ATTEMPTS - 1 or not _is_transient(cause):
                raise UserError(_reason(name, cause, doing)) from error
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Keeps the client from logging what ``ask`` reports in one line, and from drawing bars unless they are wanted.

    On a terminal it may say that it waits before it tries again.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    live = sys.stderr.isatty()
    level = logging.get_verbosity()
    # A value of HF_HUB_DISABLE_PROGRESS_BARS takes precedence over calls.
    hidden = not (live and bars) and constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if not live:
        logging.set_verbosity_error()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hidden:
            enable_progress_bars()


def _cause_of(error: Exception) -> Exception:
    """The error that the client's "not found locally" or "upload failed" stands for."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError | RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: Exception) -> bool:
    """Whether the same request may work a moment later."""
    if (status := _status(error)) is not None:
        return status in TRANSIENT_STATUS
    return type(error).__name__ in TRANSIENT_ERRORS or "Consistency check failed" in str(error)


def _reason(name: str, error: Exception, doing: str) -> str:
    """One line for the user."""
    from huggingface_hub import constants, errors

    hub, repo, status = constants.ENDPOINT, name.partition("@")[0], _status(error)
    failed = f"{name} is not a folder here, and cannot be" if doing == DOWNLOADED else f"{name} cannot be"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return (
            f"{name} is neither a folder here nor complete in the Hub's cache, {constants.HF_HUB_CACHE}, and downloads "
            "are switched off: unset HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {hub}/{repo}, then {log_in} of that account"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: {repo} has no such revision; name a branch, a tag or a whole commit hash of {hub}/{repo}"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"{name} is neither a folder here nor a model that {hub} shows you: if it is private, {log_in}"
    if status == 403:
        return f"{failed} {doing}: {hub} denies access; {log_in} of an account that may do this"
    if status is not None:
        return f"{failed} {doing}: {hub} answers with status {status}; try again later"
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError"):
        return f"{failed} {doing}: {hub} cannot be reached ({_line(error)}); check the network and HF_ENDPOINT"
    return f"{failed} {doing}: {_line(error)}; run the command again to continue"


def _line(error: Any) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return text or type(error).__name__
