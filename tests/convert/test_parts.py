"""A LLaVA out of a language model, a vision tower and a projector, new or pretrained."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny_torch import GOLDEN, VARIANTS, assert_same, edit_json, rewrite, weights

from pdrop_jax import cli
from pdrop_jax.checkpoint import load
from pdrop_jax.config import LlavaConfig
from pdrop_jax.convert.check import compare
from pdrop_jax.convert.exporter import export
from pdrop_jax.convert.importer import convert, write
from pdrop_jax.convert.sources import open_parts, open_source
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

PREFIXES = ["model.mm_projector.", "mm_projector.", "", "base_model.model.model.mm_projector."]
D, D_VISION = 48, 32


def take_apart(model, root):
    """Saves a LlavaForConditionalGeneration as llm/, vision/ and mm_projector.bin."""
    llm = transformers.AutoModelForCausalLM.from_config(model.config.text_config)
    llm.model.load_state_dict(model.model.language_model.state_dict())
    llm.lm_head.weight = model.lm_head.weight
    llm.save_pretrained(root / "llm")
    (root / "llm" / "tokenizer.model").write_text("words")
    model.model.vision_tower.save_pretrained(root / "vision")
    (root / "vision" / "preprocessor_config.json").write_text("{}")
    projector = model.model.multi_modal_projector.state_dict()
    names = {f"linear_{n + 1}.{kind}": f"{2 * n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")}
    save_projector(root, {names[name]: x.numpy() for name, x in projector.items()})
    return root


def save_projector(root, tensors, prefix=PREFIXES[0]):
    torch.save({prefix + name: torch.tensor(x) for name, x in tensors.items()}, root / "mm_projector.bin")


def projector_of(root):
    return {
        name.removeprefix(PREFIXES[0]): x.numpy()
        for name, x in torch.load(root / "mm_projector.bin", weights_only=True).items()
    }


@pytest.fixture(scope="session")
def taken_apart(torch_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return {variant: take_apart(model, root / variant) for variant, model in torch_model.items()}


@pytest.fixture
def parts(taken_apart, tmp_path):
    """A copy of the small GQA model's parts to spoil."""
    return shutil.copytree(taken_apart["gqa"], tmp_path / "parts")


def arrays_of(folder):
    return {name: np.asarray(x) for name, x in flatten_dict(load(folder)[1], sep=".").items()}


def join(parts, out, **kwargs):
    """Joins the parts; returns the config and the arrays that were written."""
    writing = {key: kwargs.pop(key) for key in ("tokenizer", "dtype", "template") if key in kwargs}
    write(open_parts(parts / "llm", parts / "vision", **kwargs), out, **writing)
    return LlavaConfig.load(out), arrays_of(out)


def refused(parts, tmp_path, message, lines=1, **kwargs):
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        join(parts, tmp_path / "out", **kwargs)
    assert set(tmp_path.iterdir()) == before
    assert len(str(caught.value).splitlines()) == lines
    return str(caught.value)


@pytest.mark.parametrize("variant", [variant for variant, settings in VARIANTS.items() if "kind" not in settings])
def test_parts_with_their_projector_are_the_whole(variant, taken_apart, hf_folder, tmp_path):
    parts = taken_apart[variant]
    config, arrays = join(parts, tmp_path / "out", projector=parts / "mm_projector.bin")
    summary = convert(hf_folder[variant], tmp_path / "whole")
    assert_same(arrays, arrays_of(tmp_path / "whole"))
    # What no part says: pictures are padded as in LLaVA-1.5, and "<image>" is in no vocabulary.
    assert config == dataclasses.replace(summary.config, image_aspect="pad", image_token_id=None)
    unused = "unused.safetensors"
    assert_same(load_file(tmp_path / "out" / unused), load_file(tmp_path / "whole" / unused))


def test_a_tower_may_be_half_of_a_siglip(taken_apart, tmp_path):
    parts = shutil.copytree(taken_apart["qwen2_siglip_head"], tmp_path / "parts")
    expected = join(parts, tmp_path / "expected", seed=1)
    tower = transformers.SiglipVisionModel.from_pretrained(parts / "vision")
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.SiglipConfig(text_config=text, vision_config=tower.config.to_dict())
    whole = transformers.SiglipModel(config)
    whole.vision_model.load_state_dict(tower.state_dict())
    shutil.rmtree(parts / "vision")
    whole.save_pretrained(parts / "vision")
    config, arrays = join(parts, tmp_path / "out", seed=1)
    assert config == expected[0]
    assert_same(arrays, expected[1])


@pytest.mark.parametrize("variant", ["mistral", "qwen2_siglip"])
def test_joined_parts_go_to_transformers(variant, taken_apart, torch_model, tmp_path):
    parts = shutil.copytree(taken_apart[variant], tmp_path / "parts")
    (parts / "llm" / "tokenizer.model").unlink()
    source = open_parts(parts / "llm", parts / "vision", projector=parts / "mm_projector.bin")
    config = write(source, tmp_path / "ours").config
    assert config.template == {"mistral": "mistral_instruct", "qwen2_siglip": "qwen"}[variant]
    difference, largest = compare(source, tmp_path / "ours")
    assert largest > 1
    assert difference < 1e-4
    export(tmp_path / "ours", tmp_path / "back", "hf")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    expected = torch_model[variant].state_dict()
    for name, x in model.state_dict().items():
        rows = len(expected[name]) if x.ndim else None  # "<image>" has made the vocabulary larger
        assert torch.equal(x[:rows], expected[name]), name
    assert model.config.image_token_id == 71


def test_a_language_model_in_shards_and_half_precision(parts, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(parts / "llm", dtype=torch.bfloat16)
    shutil.rmtree(parts / "llm")
    model.save_pretrained(parts / "llm", max_shard_size="20KB")
    assert len(list((parts / "llm").glob("*.safetensors"))) > 2
    _, arrays = join(parts, tmp_path / "out")
    assert {x.dtype for x in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    expected = model.model.layers[2].mlp.up_proj.weight.detach().float().numpy().T
    np.testing.assert_array_equal(arrays["stages.0.mlp.up.kernel"][2].astype(np.float32), expected)


def test_a_language_model_in_a_pickle(parts, tmp_path):
    expected = join(parts, tmp_path / "expected")[1]
    tensors = weights(parts / "llm") | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    torch.save({name: torch.tensor(x) for name, x in tensors.items()}, parts / "llm" / "pytorch_model.bin")
    (parts / "llm" / "model.safetensors").unlink()
    assert_same(join(parts, tmp_path / "out")[1], expected)


def test_a_new_projector_is_drawn_as_torch_draws_it(parts, tmp_path):
    _, arrays = join(parts, tmp_path / "out", seed=3)
    for n, fan_in in ((0, D_VISION), (1, D)):
        theirs = torch.nn.Linear(fan_in, D)
        for kind, like in (("kernel", theirs.weight), ("bias", theirs.bias)):
            x = arrays[f"projector.linear_{n}.{kind}"]
            assert x.shape == tuple(like.shape)[::-1]
            assert np.abs(x).max() <= fan_in**-0.5
            assert np.std(x) == pytest.approx(float(like.std()), rel=0.3 if kind == "bias" else 0.1)
    again, other = (join(parts, tmp_path / f"out{seed}", seed=seed)[1] for seed in (3, 4))
    assert_same(again, arrays)
    same = {name for name, x in other.items() if np.array_equal(x, arrays[name])}
    assert arrays.keys() - same == {f"projector.linear_{n}.{kind}" for n in (0, 1) for kind in ("kernel", "bias")}


def test_a_new_linear_projector(parts, tmp_path):
    config, arrays = join(parts, tmp_path / "out", projector_layers=1)
    assert config.projector_layers == 1
    assert arrays["projector.linear_0.kernel"].shape == (D_VISION, D)
    assert "projector.linear_1.kernel" not in arrays


def test_logits_of_a_joined_model_are_those_of_transformers(parts, tmp_path):
    opened = open_parts(parts / "llm", parts / "vision")
    write(opened, tmp_path / "out")
    difference, largest = compare(opened, tmp_path / "out")
    assert largest > 1
    assert difference < 1e-4


def test_companions_come_from_their_part(parts, tmp_path):
    edit_json(parts / "llm" / "generation_config.json", eos_token_id=[5, 7])
    config, _ = join(parts, tmp_path / "out", template="llava_llama_2", schedule=DropSchedule((1,), (0.5,)))
    found = {path.name for path in (tmp_path / "out").iterdir()}
    arrays = {"config.json", "params", "arrays.json", "sizes.json", "checksums.json", "source.json"}
    arrays.add("unused.safetensors")
    assert found - arrays == {"tokenizer.model", "generation_config.json", "preprocessor_config.json"}
    assert (config.eos_token_ids, config.template) == ((5, 7), "llava_llama_2")
    assert config.schedule == DropSchedule((1,), (0.5,), "dense")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_every_kind_of_projector_file_gives_the_same_arrays(prefix, suffix, parts, tmp_path):
    _, expected = join(parts, tmp_path / "expected", projector=parts / "mm_projector.bin")
    tensors = projector_of(parts)
    file = parts / f"mm_projector.{suffix}"
    if suffix == "bin":
        save_projector(parts, tensors, prefix)
    else:
        save_file({prefix + name: x for name, x in tensors.items()}, file)
    assert_same(join(parts, tmp_path / "out", projector=file)[1], expected)


def test_a_pretrained_linear_projector_says_that_it_is(parts, tmp_path):
    weight = np.random.default_rng(0).random((D, D_VISION), np.float32)
    save_projector(parts, {"weight": weight, "bias": np.ones(D, np.float32)})
    config, arrays = join(parts, tmp_path / "out", projector=parts / "mm_projector.bin")
    assert config.projector_layers == 1
    np.testing.assert_array_equal(arrays["projector.linear_0.kernel"], weight.T)


def changed(parts):
    """A projector that differs, and our arrays of it."""
    tensors = {name: x + 1 for name, x in projector_of(parts).items()}
    save_projector(parts, tensors)
    ours = {f"projector.linear_{n}.kernel": tensors[f"{2 * n}.weight"].T for n in (0, 1)}
    return ours | {f"projector.linear_{n}.bias": tensors[f"{2 * n}.bias"] for n in (0, 1)}


def test_a_projector_replaces_that_of_a_hugging_face_checkpoint(parts, hf, tmp_path):
    convert(hf, tmp_path / "expected")
    new = changed(parts)
    write(open_source(hf, projector=parts / "mm_projector.bin"), tmp_path / "out")
    assert_same(arrays_of(tmp_path / "out"), arrays_of(tmp_path / "expected") | new)


def test_a_projector_replaces_that_of_an_original_checkpoint(original, tmp_path):
    convert(original, tmp_path / "expected")
    tensors = {name: x for name, x in weights(original).items() if "mm_projector" in name}
    save_projector(tmp_path, {name: x + 1 for name, x in tensors.items()}, prefix="")
    write(open_source(original, projector=tmp_path / "mm_projector.bin"), tmp_path / "out")
    expected = arrays_of(tmp_path / "expected")
    assert_same(
        arrays_of(tmp_path / "out"), {n: x + 1 if n.startswith("projector.") else x for n, x in expected.items()}
    )
    rewrite(original, lambda old: {name: x for name, x in old.items() if name not in tensors})
    save_projector(tmp_path, tensors, prefix="")
    write(open_source(original, projector=tmp_path / "mm_projector.bin"), tmp_path / "out2")
    assert_same(arrays_of(tmp_path / "out2"), expected)


def test_all_that_is_wrong_with_a_projector_is_reported_at_once(parts, tmp_path):
    tensors = projector_of(parts) | {"2.weight": np.zeros((D, D + 1), np.float32), "4.bias": np.zeros(D, np.float32)}
    del tensors["0.bias"]
    torch.save(
        {f"model.mm_projector.{name}": torch.tensor(x) for name, x in tensors.items()}
        | {"model.embed_tokens.weight": torch.zeros(3, 2)},
        parts / "mm_projector.bin",
    )
    text = refused(
        parts, tmp_path, "1 missing, 2 unexpected, 1 of another shape", 5, projector=parts / "mm_projector.bin"
    )
    for part in (
        f"{parts}/mm_projector.bin does not contain the projector of this model",
        "missing: model.mm_projector.0.bias [48]",
        "wrong shape: model.mm_projector.2.weight is [48, 49], expected [48, 48]",
        "unexpected: model.mm_projector.4.bias [48]",
        "unexpected: model.embed_tokens.weight [3, 2]",
    ):
        assert part in text


def test_a_projector_of_another_kind_than_asked_for(parts, tmp_path):
    file = parts / "mm_projector.bin"
    refused(parts, tmp_path, "2 unexpected, 0 of another shape", 3, projector=file, projector_layers=1)
    save_projector(parts, {"weight": np.zeros((D, D_VISION), np.float32), "bias": np.zeros(D, np.float32)})
    refused(parts, tmp_path, "4 missing, 2 unexpected", 7, projector=file, projector_layers=2)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_projector_file_that_cannot_be_read(suffix, parts, tmp_path):
    file = parts / f"projector.{suffix}"
    refused(parts, tmp_path, f"projector.{suffix} cannot be read: there is no such file", projector=file)
    file.write_bytes(b"no tensors")
    refused(parts, tmp_path, f"projector.{suffix} (cannot be read|is refused)", projector=file)


def test_a_projector_in_the_folder_of_the_language_model(parts, tmp_path):
    (parts / "mm_projector.bin").rename(parts / "llm" / "mm_projector.bin")
    refused(parts, tmp_path, "llm already contains a projector: .* --projector FILE")


def test_all_that_is_wrong_with_the_parts_is_reported_at_once(parts, tmp_path):
    rewrite(parts / "llm", lambda old: {n: x for n, x in old.items() if n != "model.layers.1.mlp.up_proj.weight"})

    def spoil(tensors):
        name = next(name for name in tensors if name.endswith("pre_layrnorm.bias"))
        return tensors | {name: np.zeros(31, np.float32), "color": np.zeros(2, np.float32)}

    rewrite(parts / "vision", spoil)
    text = refused(parts, tmp_path, "1 missing, 1 unexpected, 1 of another shape", lines=4)
    assert text.startswith(f"{parts}/llm and {parts}/vision do not contain the models")
    assert "missing: model.layers.1.mlp.up_proj.weight [96, 48]" in text
    assert "color [2]" in text


def test_parts_of_another_kind(parts, hf, tmp_path):
    config = parts / "llm" / "config.json"
    for kind in ("gemma", "llava_llama", "llava"):
        edit_json(config, model_type=kind)
        refused(
            parts,
            tmp_path,
            f"--llm takes a llama or mistral or qwen2 or qwen3 language model, .*llm has model_type '{kind}'",
        )
    edit_json(config, model_type="llama")
    edit_json(parts / "vision" / "config.json", model_type="dinov2")
    refused(parts, tmp_path, "vision model_type 'dinov2' is not supported")
    shutil.rmtree(parts / "vision")
    refused(parts, tmp_path, "vision is not a checkpoint: it has no config.json")
    convert(hf, tmp_path / "ours")
    shutil.rmtree(parts / "llm")
    shutil.move(tmp_path / "ours", parts / "llm")
    refused(parts, tmp_path, "llm is already converted")


def test_a_template_that_is_not_known(parts, tmp_path):
    refused(parts, tmp_path, "template 'vicuna' is not known: choose one of vicuna_v1", template="vicuna")


def test_a_language_model_alone(parts, tmp_path):
    with pytest.raises(UserError, match=r"llm is a language model: to build a LLaVA from it, use --llm"):
        convert(parts / "llm", tmp_path / "out")


def pdrop(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["pdrop", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.mark.parametrize("first", [True, False])
def test_the_command(first, parts, tmp_path, monkeypatch, capfd):
    places = ["--llm", parts / "llm", "--vision", parts / "vision"]
    out = tmp_path / "out"
    arguments = [out, *places] if first else [*places, out]
    assert not pdrop(monkeypatch, "convert", *arguments, "--seed", 3, "--template", "plain", "--check")
    summary, new, check = capfd.readouterr().out.splitlines()
    assert summary.startswith(f"{out}: ")
    assert new == "The projector is randomly initialized (seed 3); train it before use"
    assert float(check.split()[4].rstrip(",")) < 1e-4
    assert json.loads((out / "config.json").read_text())["template"] == "plain"
    assert_same(arrays_of(out), join(parts, tmp_path / "expected", seed=3)[1])


def test_the_command_with_a_projector(parts, hf, tmp_path, monkeypatch, capfd):
    new = changed(parts)
    arguments = [hf, "--projector", parts / "mm_projector.bin", tmp_path / "out"]
    assert not pdrop(monkeypatch, "convert", *arguments)
    assert "projector" not in capfd.readouterr().out
    found = arrays_of(tmp_path / "out")
    assert_same({name: found[name] for name in new}, new)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["SRC", "OUT", "--llm", "LLM", "--vision", "V"],
            "Both SRC (SRC) and --llm were given. Usage: pdrop convert --llm DIR --vision DIR OUT",
        ),
        (["OUT", "--llm", "LLM"], "--llm requires a vision tower: add --vision DIR"),
        (["SRC"], "Missing OUT. Usage: pdrop convert SRC OUT"),
        (["SRC", "OUT", "--projector-type", "linear"], "--projector-type requires --llm"),
        (["OUT", "--llm", "LLM", "--vision", "V"], "LLM is not a checkpoint: it has no config.json"),
        ([GOLDEN / "model_mha", "OUT", "--projector", "mm_projector.bin"], "mm_projector.bin cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert pdrop(monkeypatch, "convert", *arguments) == 2
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith(f"pdrop convert: {message}")
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
