"""The compilation cache: where it is, who decides, and what a second process saves."""

import os
import re
import subprocess
import sys

import pytest

from pdrop_jax.cache_folder import cache_folder
from pdrop_jax.compilation_cache import enable_in_environment, settings

SMALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({}, os.path.expanduser("~/.cache/pdrop/x")),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/pdrop/x"),
        ({"XDG_CACHE_HOME": "relative"}, os.path.expanduser("~/.cache/pdrop/x")),
        ({"XDG_CACHE_HOME": "/xdg", "PDROP_CACHE": "/own"}, "/own/x"),
        ({"PDROP_CACHE": "gs://bucket/cache/"}, "gs://bucket/cache/x"),
    ],
)
def test_where_caches_are(environ, folder):
    assert cache_folder("x", environ) == folder


@pytest.mark.parametrize(
    ("before", "added"),
    [
        ({"PDROP_CACHE": "{}"}, {"JAX_COMPILATION_CACHE_DIR": "{}/compilation", **SMALL}),
        ({"PDROP_CACHE": "{}", "JAX_COMPILATION_CACHE_DIR": "/own"}, {}),
        ({"PDROP_CACHE": "{}", "JAX_COMPILATION_CACHE_DIR": ""}, {}),  # none at all
        (
            {"PDROP_CACHE": "{}", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "9"},
            {
                "JAX_COMPILATION_CACHE_DIR": "{}/compilation",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0",
            },
        ),
        (
            {"PDROP_CACHE": "gs://bucket"},
            {
                "JAX_COMPILATION_CACHE_DIR": "gs://bucket/compilation",
                "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "",
                **SMALL,
            },
        ),
    ],
)
def test_a_users_own_settings_win(tmp_path, before, added):
    before, added = ({name: text.format(tmp_path) for name, text in x.items()} for x in (before, added))
    environ = dict(before)
    enable_in_environment(environ)
    assert environ == before | added


def test_a_folder_that_is_not_writable_is_a_note(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", "/proc/none", "a\0b"):
        assert settings({"PDROP_CACHE": str(folder)}) == {}
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(
            r"note: compiled programs are not kept, because .*/compilation is not writable: .*PDROP_CACHE.*", line
        )


PROGRAM = """
import jax, pdrop_jax
from pdrop_jax.compilation_cache import CompilationStats
assert jax.config.jax_compilation_cache_dir is None
pdrop_jax.enable_compilation_cache()
with CompilationStats() as stats:
    jax.jit(lambda x: x * x + 1)(3.0).block_until_ready()
print(stats.compiled, stats.cached)
"""


def test_the_library_keeps_programs_only_if_it_is_told_to(tmp_path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environ |= {"PDROP_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def run():
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout.split()

    first, second = run(), run()
    assert int(first[0]) > 0
    assert first[1] == "0"
    assert second == ["0", first[0]]
