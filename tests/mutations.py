"""Values that a key of a foreign file may hold instead of what is expected, and how a function has to take them."""

import contextlib
import copy
import json
import os
import signal
import socket

import numpy as np

from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.hf_config import llava_from_hf
from pdrop_jax.errors import UserError
from pdrop_jax.inputs.images import as_tokens, load_image_processor

DEEP = []
for _ in range(300):
    DEEP = [DEEP]
NASTY = [None, "", "x", 0, -1, 10**9, 10**30, 1.5, float("nan"), float("inf"), True, [], [None], {}, {"x": 1}, DEEP]
SECONDS = 5  # of one call; a hang or an allocation of what a file says would take longer


def paths_of(data, path=()):
    """The path of every value of a JSON document below its root."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths_of(value, (*path, key))


def with_value(data, path, value):
    """A copy of ``data`` with ``value`` at ``path``."""
    changed = copy.deepcopy(data)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


def mutations(data, values=NASTY):
    """(path, value, document) with each value of ``data`` replaced by each of ``values``."""
    for path in paths_of(data):
        for value in values:
            yield path, value, with_value(data, path, value)


@contextlib.contextmanager
def one_line(what, listing=False):
    """What runs in it ends, soon, in nothing worse than a UserError of one line. Gives the message.

    ``listing``: the line may be followed by an indented one for each tensor that does not fit.
    """
    said = []
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield said
    except UserError as error:
        said.append(str(error))
        _, *more = said[0].splitlines()
        assert all(listing and line.startswith("  ") for line in more), (what, said[0])
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_special(kind, path, device="/dev/zero"):
    """Puts what is no regular file at ``path``: a FIFO, a socket, a link to a device, or a folder."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    elif kind == "device":
        path.symlink_to(device)
    else:
        assert kind == "folder"
        path.mkdir()


def _too_slow(*_):
    raise TimeoutError(f"not over after {SECONDS} s")


def refusals(data, call):
    """How many of ``mutations(data)`` the function ``call`` (document, what it is) refuses, each by ``one_line``."""
    refused = 0
    for path, value, changed in mutations(data):
        with one_line((path, value)) as said:
            call(changed, (path, value))
        refused += len(said)
    return refused


def check_config(changed, what):
    """A foreign config is refused, or becomes one that survives its own file."""
    config = llava_from_hf(changed)
    assert LlavaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config, what


def check_own_config(changed, what):
    LlavaConfig.from_json(changed)


def image_processor_refusals(settings, folder, config, picture):
    """``refusals`` of preprocessor_config.json; what is accepted makes finite pixels of ``picture``."""

    def check(changed, what):
        (folder / "preprocessor_config.json").write_text(json.dumps(changed))
        found = as_tokens(picture, load_image_processor(folder, config), config)
        assert np.isfinite(found.crops).all(), what

    return refusals(settings, check)
