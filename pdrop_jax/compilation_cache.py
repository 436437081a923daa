"""JAX's persistent compilation cache: where it is, and how much compiling it saves.

A program that one process has compiled is read from the cache by the next, until the program, the versions of JAX and
XLA, or the kind of the devices change. A cache contains machine code, so it must come from nobody else.
"""

import contextlib
import os
import sys
from collections.abc import MutableMapping
from typing import Any

from pdrop_jax.cache_folder import cache_folder
from pdrop_jax.errors import printable

FOLDER = "compilation"
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event at the end of a compilation, in its thread

# JAX keeps programs that took a second or more. A start of training runs dozens of smaller ones, and compiling them
# takes longer than reading them.
EVERY_PROGRAM = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def settings(environ: MutableMapping[str, str] = os.environ) -> dict[str, Any]:
    """Values of ``jax.config`` that switch the cache on; settings that ``environ`` makes itself are left out.

    Empty if the user has chosen another folder with $JAX_COMPILATION_CACHE_DIR. Also empty, with a note on stderr, if
    the folder is not writable.
    """
    if "JAX_COMPILATION_CACHE_DIR" in environ:
        return {}
    folder = cache_folder(FOLDER, environ)
    found: dict[str, Any] = {"jax_compilation_cache_dir": folder, **EVERY_PROGRAM}
    if "://" in folder:
        found["jax_persistent_cache_enable_xla_caches"] = ""  # XLA writes its own caches to local folders only
    else:
        try:
            os.makedirs(folder, exist_ok=True)
            writable = os.access(folder, os.W_OK | os.X_OK)
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            writable = False
        if not writable:
            print(
                f"note: compiled programs are not kept, because {printable(folder)} is not writable: "
                "set PDROP_CACHE to another folder",
                file=sys.stderr,
            )
            return {}
    return {name: value for name, value in found.items() if name.upper() not in environ}


def enable_in_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Switches the cache on for a JAX that has not been imported yet, and for child processes."""
    environ.update({name.upper(): str(value) for name, value in settings(environ).items()})


def enable_compilation_cache() -> None:
    """Switches JAX's persistent compilation cache on for this process, as the ``pdrop`` command does for its own.

    The folder is ``$PDROP_CACHE/compilation``, by default ``~/.cache/pdrop/compilation``. Call it before the first
    model is loaded. Nothing happens if $JAX_COMPILATION_CACHE_DIR is set, which JAX reads itself. A folder that is not
    writable is a note on stderr.
    """
    import jax

    for name, value in settings().items():
        jax.config.update(name, value)


class CompilationStats:
    """Context manager that counts the programs that JAX compiles, or reads from its persistent cache, inside it.

    Attributes:
      requested: programs that were needed and not yet in memory.
      cached: those of them that were read from the cache.
      seconds: time spent compiling or reading.
      seconds_saved: compile time that the cache saved, in seconds. JAX stores whole seconds, rounded down.
    """

    def __init__(self) -> None:
        self.requested = self.cached = 0
        self.seconds = self.seconds_saved = 0.0

    @property
    def compiled(self) -> int:
        """Number of programs that were compiled."""
        return self.requested - self.cached

    def text(self) -> str:
        """One line about the programs of a run."""
        saved = f", which saved {self.seconds_saved:,.0f} s" if self.cached else ""
        return f"programs    {self.compiled:,} compiled, {self.cached:,} read from the compilation cache{saved}"

    def __enter__(self) -> "CompilationStats":
        from jax import monitoring

        monitoring.register_event_listener(self._event)
        monitoring.register_event_duration_secs_listener(self._duration)
        return self

    def __exit__(self, *_: object) -> None:
        from jax import monitoring

        with contextlib.suppress(ValueError, AssertionError):  # somebody has cleared all listeners
            monitoring.unregister_event_listener(self._event)
            monitoring.unregister_event_duration_listener(self._duration)

    def _event(self, event: str, **_: Any) -> None:
        self.cached += event == "/jax/compilation_cache/cache_hits"

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            self.requested += 1
            self.seconds += duration_secs
        elif event == "/jax/compilation_cache/compile_time_saved_sec":
            self.seconds_saved += max(duration_secs, 0.0)
