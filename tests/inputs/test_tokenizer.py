"""Damaged tokenizer files give a one-line error that names the folder or file, or a usable tokenizer."""

import json
import os
import random
import shutil

import pytest
from test_chat_template import GOLDEN, ROOT

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.chat_template import token_ids
from pdrop_jax.inputs.tokenizer import load_tokenizer

VALUES = [None, "x", 0, -1, 10**9, 2**70, [], {}, float("nan"), [[[]]], True]
WHOLE = [b"null", b"5", b"[]", b"{}", b'"x"', b"NaN", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 6000, b"\xff\xfe", b""]
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def serialized(tmp_path):
    return shutil.copytree(ROOT / "examples/tiny_tokenizer", tmp_path / "serialized")


@pytest.fixture
def sentencepiece(tmp_path):
    folder = tmp_path / "sentencepiece"
    folder.mkdir()
    shutil.copy(GOLDEN / "tokenizer/tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | TOKENS))
    return folder


def used(folder):
    """True if the tokenizer can be used, False if it is refused."""
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        line = str(error)
    else:
        line = ""
    if line:
        assert "\n" not in line
        assert str(folder) in line
        assert len(line) < 500
        return False
    ids = token_ids(tokenizer, "What <image> is é你\x00\nthis?")
    tokenizer.decode([i for i in ids if i >= 0] + [10**6], skip_special_tokens=True)
    return True


def places(value, above=()):
    """Paths to the first keys and items of every object and list."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:6]:
        yield (*above, key)
        yield from places(item, (*above, key))


def replaced(value, path, new):
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_any_value_in_place_of_another(name, serialized):
    file = serialized / name
    original = json.loads(file.read_text())
    rng = random.Random(0)
    table = [(path, new) for path in places(original) for new in VALUES]
    outcomes = []
    for path, new in rng.sample(table, min(len(table), 150)):
        file.write_text(json.dumps(replaced(original, path, new)))
        outcomes.append(used(serialized))
    assert set(outcomes) == {True, False}


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_files_that_are_no_json_objects(name, serialized):
    for content in WHOLE:
        (serialized / name).write_bytes(content)
        if content != b"{}":
            with pytest.raises(UserError, match=f"{name} is malformed") as caught:
                load_tokenizer(serialized)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("special_tokens_map.json", '{"bos_token": 5}'),
        ("special_tokens_map.json", '{"additional_special_tokens": 5}'),
        ("added_tokens.json", '{"<x>": "y"}'),
        ("added_tokens.json", '{"<x>": null}'),
        ("vocab.json", "null"),
        ("merges.txt", "a"),
        ("chat_template.jinja", "{% for"),
        ("chat_template.json", "[]"),
        ("generation_config.json", "[]"),
    ],
)
def test_companions_of_a_tokenizer(name, content, serialized):
    (serialized / name).write_text(content)
    used(serialized)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_flipped_bits(name, serialized):
    file = serialized / name
    data, rng = bytearray(file.read_bytes()), random.Random(0)
    outcomes = []
    for _ in range(40):
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[place] ^= bit
        file.write_bytes(data)
        outcomes.append(used(serialized))
        data[place] ^= bit
    assert False in outcomes


def test_a_damaged_sentencepiece_model(sentencepiece, capfd):
    assert used(sentencepiece)
    file = sentencepiece / "tokenizer.model"
    data, rng = file.read_bytes(), random.Random(0)
    for left in (0, 1, 1000, len(data) // 2):
        file.write_bytes(data[:left])
        assert not used(sentencepiece)
    for _ in range(2):
        place = rng.randrange(300)
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        used(sentencepiece)
    assert "Traceback" not in capfd.readouterr().err


def test_a_template_with_a_token_that_is_not_defined(serialized, capfd):
    """The tokenizers library would panic, and only when the tokenizer is used."""
    file = serialized / "tokenizer.json"
    data = json.loads(file.read_text())
    data["post_processor"]["single"][0]["SpecialToken"]["id"] = "<nowhere>"
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match="post_processor has the token '<nowhere>' but does not define it"):
        load_tokenizer(serialized)
    data["post_processor"] = {"type": "Sequence", "processors": [data["post_processor"]]}
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match="post_processor has the token '<nowhere>' but does not define it"):
        load_tokenizer(serialized)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"])
def test_a_fifo_is_not_waited_for(name, serialized):
    (serialized / name).unlink(missing_ok=True)
    os.mkfifo(serialized / name)
    with pytest.raises(UserError, match=f"{name} is a FIFO, expected a file"):
        load_tokenizer(serialized)
