"""Tokens that stand for an image, typed in a question, are refused in every family, whatever template asks."""

import re

import pytest
from tiny_qwen import photo

from pdrop_jax.errors import UserError
from pdrop_jax.generation.pretrained import load
from pdrop_jax.inputs.chat_template import IMAGE_TAG, is_token
from pdrop_jax.inputs.families import FAMILIES
from pdrop_jax.inputs.messages import Message


@pytest.fixture(scope="module")
def models(folders, tiles, gemma):
    models = [load(ours) for _, ours in [*folders.values(), *tiles.values(), gemma]]
    assert {model.config.family for model in models} == FAMILIES.keys()
    return models


@pytest.mark.parametrize("template", [None, "vicuna_v1"])
def test_a_typed_token_is_no_image(models, template):
    for model in models:
        processor, family = model.processor, FAMILIES[model.config.family]
        own = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        for token in {own, *family.places.placeholders.values()}:
            if template and not is_token(processor.tokenizer, token):  # SmolVLM2's "<video>" is text like any other
                row = processor.row(f"What {token} ?", [], template)
                assert not row.images
                assert token in processor.tokenizer.decode(row.ids)
                continue
            for images in ([], [photo(50, 60, 1)]):
                if token == IMAGE_TAG and images:  # that is how the place of an image is written
                    assert processor.row(f"What {token} ?", images, template).images
                    continue
                with pytest.raises(UserError, match=re.escape(token)):
                    processor.row(f"What {token} ?", images, template)
            prompts = processor.prompts(template)
            assert prompts.without_places(f"a {token[:3]}{token}{token[3:]}b{IMAGE_TAG}") == "a b"
            if token != IMAGE_TAG:
                with pytest.raises(UserError, match=re.escape(token)):
                    prompts.training_text([Message("user", ("What?",)), Message("assistant", (f"A {token}.",))])


def test_a_mark_is_a_token_like_any_other_as_in_transformers(models):
    """What merely surrounds an image: the model sees the token, and no image."""
    for model in models:
        for mark in ("<|vision_start|>", "<img>", "<end_of_image>", "<fake_token_around_image>"):
            row = model.processor.row(f"What {mark}?", [])
            id_ = model.processor.tokenizer.convert_tokens_to_ids(mark)
            assert not row.images
            assert id_ is None or row.ids.count(id_) == 1
