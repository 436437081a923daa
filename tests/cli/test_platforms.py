"""JAX is kept from an installed libtpu only where there is surely no TPU, and nobody has said otherwise."""

import os
import subprocess

import pytest
from command import PDROP

from pdrop_jax.cli import platforms


@pytest.mark.parametrize(
    ("libtpu", "tpu", "plugin", "before", "after"),
    [
        (True, False, False, {}, {"JAX_PLATFORMS": "cpu"}),
        (True, True, False, {}, {}),
        (True, False, True, {}, {}),
        (False, False, False, {}, {}),
        (True, False, False, {"JAX_PLATFORMS": ""}, {"JAX_PLATFORMS": ""}),
        (True, False, False, {"JAX_PLATFORMS": "tpu"}, {"JAX_PLATFORMS": "tpu"}),
    ],
)
def test_when_jax_is_told_to_use_the_cpu(monkeypatch, libtpu, tpu, plugin, before, after):
    monkeypatch.setattr(platforms, "_has_libtpu", lambda: libtpu)
    monkeypatch.setattr(platforms, "_may_have_tpu", lambda: tpu)
    monkeypatch.setattr(platforms, "_has_plugin", lambda: plugin)
    environ = dict(before)
    platforms.skip_missing_tpu(environ)
    assert environ == after


def test_an_answer_without_settings_prints_nothing_else(tmp_path):
    """And its programs are kept: the second answer finds all of them in the cache."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    environ["PDROP_CACHE"] = str(tmp_path)
    command = [*PDROP, "generate", "--prompt", "Hi", "--max-new-tokens", "1"]
    kept = []
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environ)
        assert result.stderr == ""
        assert len(result.stdout.splitlines()) == 1
        kept.append(sorted(os.listdir(tmp_path / "compilation")))
    assert len(kept[0]) > 1
    assert kept[0] == kept[1]


def test_the_version():
    result = subprocess.run([*PDROP, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "pdrop 0.1.0\n"
