"""``pdrop convert`` and ``pdrop export`` as typed."""

import jax
import numpy as np
import pytest
from tiny_torch import as_version_4, assert_same, rewrite, weights

from pdrop_jax import checkpoint, cli
from pdrop_jax.config import LlavaConfig
from pdrop_jax.schedule import DropSchedule


def pdrop(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["pdrop", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_there_and_back(hf, tmp_path, monkeypatch, capfd):
    rewrite(hf, as_version_4)
    (hf / "tokenizer.json").write_text("{}")
    arguments = ["--layers", 0, 2, "--ratios", 0.5, 0.25, "--dtype", "float32", "--check"]
    assert not pdrop(monkeypatch, "convert", hf, tmp_path / "ours", *arguments)
    out, err = capfd.readouterr()
    first, check = out.splitlines()
    assert first.startswith(f"{tmp_path / 'ours'}: {len(weights(hf))} tensors, ")
    assert first.endswith(" MB, float32; image tokens kept: 0.5 after 0, 0.25 after 2; prompt template: vicuna_v1")
    assert check.startswith("largest difference to PyTorch ")
    assert float(check.split()[4].rstrip(",")) < 1e-4
    assert not err  # progress is for terminals
    assert LlavaConfig.load(tmp_path / "ours").schedule == DropSchedule((0, 2), (0.5, 0.25), "dense")

    assert not pdrop(monkeypatch, "export", tmp_path / "ours", tmp_path / "back", "--format", "hf")
    out, err = capfd.readouterr()
    megabytes = sum(x.nbytes for x in weights(hf).values()) / 1e6
    assert out == f"{tmp_path / 'back'}: {len(weights(hf))} tensors, {megabytes:.1f} MB, float32, hf\n"
    assert not err
    assert_same(weights(tmp_path / "back"), weights(hf))


def test_what_was_left_to_us_is_said(hf, tmp_path, monkeypatch, capfd):
    assert not pdrop(monkeypatch, "convert", hf, tmp_path / "ours")
    first, tokenizer = capfd.readouterr().out.splitlines()
    assert first.endswith("image tokens kept: all, dense; prompt template: vicuna_v1")
    assert tokenizer.startswith(f"{hf} has no tokenizer files: pass --tokenizer DIR")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "3", "--ratios", "0.5"], "drop after layer 3 in a decoder of 3 layers"),
        (["--layers", "1"], "layers and ratios belong together"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, hf, tmp_path, monkeypatch, capfd):
    assert pdrop(monkeypatch, "convert", hf, tmp_path / "ours", *arguments) == 2
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith(f"pdrop convert: {message}")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "ours").exists()


def test_standby_tokens_are_added_and_left_out_of_exports(hf, tmp_path, monkeypatch, capfd):
    """They begin as copies of the tower's MLPs and of the projector."""
    rewrite(hf, as_version_4)
    ours = tmp_path / "ours"
    assert not pdrop(monkeypatch, "convert", hf, ours, "--standby", "8", "--seed", "3")
    assert "Its 8 standby tokens are untrained (seed 3): train them before use" in capfd.readouterr().out
    config, params = checkpoint.load(ours)
    assert config.standby.tokens == 8
    jax.tree.map(np.testing.assert_array_equal, params["standby"]["mlps"], params["vision"]["layers"]["mlp"])
    jax.tree.map(np.testing.assert_array_equal, params["standby"]["projector"], params["projector"])
    assert np.asarray(params["standby"]["tokens"]["embedding"]).std() > 0.01
    assert not pdrop(monkeypatch, "export", ours, tmp_path / "back", "--format", "hf")
    assert "standby tokens are left out, because no other library loads them" in capfd.readouterr().out
    assert_same(weights(tmp_path / "back"), weights(hf))
