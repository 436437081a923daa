"""Our prompt templates as Jinja chat templates, which transformers' ``apply_chat_template`` renders."""

import json
import pathlib

from pdrop_jax import checkpoint
from pdrop_jax.inputs.chat_template import IMAGE_TAG, template_named
from pdrop_jax.io import read_json

FILE = "chat_template.jinja"
FIXED = "This chat template takes user and assistant messages in turn, the user's first; its system prompt is fixed."


def chat_template(name: str) -> str:
    """The Jinja source of template ``name``, which renders the same text as ``inputs.chat_template.render``.

    Messages alternate between "user" and "assistant". A message's content is a string, or a list of text and image
    items whose images come first, as one "<image>" line each. ``add_generation_prompt=True`` is the answer of None in
    the last turn of ``render``. As there, BOS is left to the tokenizer.

    Raises:
      UserError: there is no such template.
    """
    parts = template_named(name)
    # A JSON string is a valid Jinja literal, so no line break of a template is at the mercy of Jinja's white space.
    image, fixed = json.dumps(f"{IMAGE_TAG}\n"), json.dumps(FIXED)
    lines = [
        "{%- for message in messages -%}",
        "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}",
        f"{{{{ raise_exception({fixed}) }}}}",
        "{%- endif -%}",
        "{%- set content = namespace(images='', text='') -%}",
        "{%- if message['content'] is string -%}",
        "{%- set content.text = message['content'] -%}",
        "{%- else -%}",
        "{%- for item in message['content'] -%}",
        "{%- if item['type'] == 'image' -%}",
        f"{{%- set content.images = content.images + {image} -%}}",
        "{%- else -%}",
        "{%- set content.text = content.text + item['text'] -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- endif -%}",
        "{%- if message['role'] == 'user' -%}",
        f"{{{{ {json.dumps(parts.first_question)} if loop.first else {json.dumps(parts.question)} }}}}",
        "{{- content.images + content.text -}}",
        "{%- if add_generation_prompt or not loop.last -%}",
        f"{{{{ {json.dumps(parts.asked)} }}}}",
        "{%- endif -%}",
        "{%- else -%}",
        f"{{{{ {json.dumps(parts.answer)} + content.images + content.text + {json.dumps(parts.answered)} }}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    if parts.max_turns is not None:
        most = json.dumps(f"This chat template holds {parts.max_turns} question and its answer.")
        lines = [
            f"{{%- if messages | length > {2 * parts.max_turns} -%}}",
            f"{{{{ raise_exception({most}) }}}}",
            "{%- endif -%}",
            *lines,
        ]
    return "\n".join(lines)


def add_chat_template(folder: pathlib.Path, name: str) -> None:
    """Writes chat_template.jinja into an exported checkpoint that has a tokenizer but no chat template yet."""
    if template_named(name).image != IMAGE_TAG:
        return  # of a family whose tokenizers come with their chat template
    found = {path.name for pattern in checkpoint.TOKENIZER for path in folder.glob(pattern)}
    if not found or any(file.startswith("chat_template") for file in found):
        return
    settings = folder / "tokenizer_config.json"
    if not (settings.exists() and read_json(settings).get("chat_template")):
        (folder / FILE).write_text(chat_template(name))
