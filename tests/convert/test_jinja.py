"""Chat templates of exports: transformers renders the same text from them as we do."""

import json

import jinja2
import pytest
import transformers
from tiny_torch import GOLDEN

from pdrop_jax.convert.exporter import export
from pdrop_jax.convert.importer import convert, write
from pdrop_jax.convert.jinja import FILE, chat_template
from pdrop_jax.convert.sources import open_source
from pdrop_jax.inputs.chat_template import IMAGE_TAG, TEMPLATES, render

TOKENIZER = GOLDEN.parent.parent / "examples" / "tiny_tokenizer"
ODD = " a \"quoted\" 'one'\n\n{{ messages }} \\n {% raw %} é<b> "
# The turns as we write them; an image is a tag and a line break before the question, as LLaVA has them.
CONVERSATIONS = [
    [("What?", None)],
    [(f"{IMAGE_TAG}\nWhat?", "A cat.")],
    [(f"{IMAGE_TAG}\n" * 2 + ODD, None)],
    [(f"{IMAGE_TAG}\nWhat?", ODD), ("And?", "A dog."), (f"{IMAGE_TAG}\nHere?", None)],
    [("", ""), (f"{IMAGE_TAG}\nHere?", "\n")],
]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TOKENIZER)


def messages_of(turns, listed):
    """The turns in transformers' form; with ``listed`` every content is a list, otherwise a plain string."""
    for question, answer in turns:
        for role, text in (("user", question), ("assistant", answer)):
            if text is not None:
                tag = f"{IMAGE_TAG}\n"
                items = [{"type": "image"}] * text.count(tag) + [{"type": "text", "text": text.replace(tag, "")}]
                yield {"role": role, "content": items if listed else text}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template.image == IMAGE_TAG])
def test_transformers_renders_the_same_text(name, turns, listed, tokenizer):
    turns = turns[: TEMPLATES[name].max_turns]
    messages = list(messages_of(turns, listed))
    asks = turns[-1][1] is None
    found = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(name), tokenize=False, add_generation_prompt=asks
    )
    assert found == render(turns, name)


@pytest.mark.parametrize(
    ("name", "roles"),
    [("vicuna_v1", ["system", "user"]), ("qwen", ["user", "user"]), ("plain", ["user", "assistant"] * 2)],
)
def test_messages_that_a_template_cannot_express_are_refused(name, roles, tokenizer):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(jinja2.TemplateError, match="This chat template"):
        tokenizer.apply_chat_template(messages, chat_template=chat_template(name), tokenize=False)


def test_an_export_carries_the_template_of_its_model(tmp_path):
    write(open_source(GOLDEN / "model_mha"), tmp_path / "ours", tokenizer=TOKENIZER, template="qwen")
    export(tmp_path / "ours", tmp_path / "back", "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back", use_fast=False)
    messages = list(messages_of(CONVERSATIONS[3], listed=True))
    found = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found == render(CONVERSATIONS[3], "qwen")


@pytest.mark.parametrize("place", [FILE, "tokenizer_config.json"])
def test_a_template_that_the_source_has_is_kept(place, tmp_path):
    convert(GOLDEN / "model_mha", tmp_path / "ours", tokenizer=TOKENIZER)
    path = tmp_path / "ours" / place
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text("its own" if place == FILE else json.dumps(settings | {"chat_template": "its own"}))
    export(tmp_path / "ours", tmp_path / "back", "hf")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == "its own"


def test_without_a_tokenizer_there_is_no_template(tmp_path):
    convert(GOLDEN / "model_mha", tmp_path / "ours")
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*"):
        for path in (tmp_path / "ours").glob(pattern):
            path.unlink()
    export(tmp_path / "ours", tmp_path / "back", "hf")
    assert not (tmp_path / "back" / FILE).exists()
