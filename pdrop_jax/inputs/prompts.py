"""How a model is asked: a conversation becomes text and token ids by LLaVA's templates, or by the model's own.

``prompt_template`` makes the one or the other from a name and the checkpoint's files; both are used alike.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.chat_template import (
    IMAGE_TAG,
    LLAVA_PLACES,
    ImagePlaces,
    Turn,
    check_reserved,
    is_token,
    render,
    template_named,
    token_ids,
    without_tags,
    write_captions,
)
from pdrop_jax.inputs.messages import Message
from pdrop_jax.inputs.model_template import OWN, ModelTemplate
from pdrop_jax.inputs.targets import Example, TrainingText, ends_answers, tokenize, training_text


@dataclasses.dataclass(frozen=True)
class LlavaTemplate:
    """Renders conversations with one of LLaVA's templates.

    Attributes:
      tokenizer: a transformers tokenizer.
      name: a name in ``chat_template.TEMPLATES``.
      places: what the model's own template would write where an image stands; as text it is refused.
    """

    tokenizer: Any
    name: str
    places: ImagePlaces = LLAVA_PLACES

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation. If the last message is from the user, it ends where the model continues.

        Raises:
          UserError: there is a system message, more turns than the template supports, or a token that stands for an
            image.
        """
        text = render(self._turns(messages), self.name)
        check_reserved(text, self._reserved, self.tokenizer)
        return text

    def ids(self, messages: Sequence[Message], captions: Sequence[Sequence[str]] = ()) -> list[int]:
        """Token ids of ``render``, with IMAGE_PLACEHOLDER for each image or video. Errors are those of ``render``.

        Args:
          captions: see ``chat_template.write_captions``.
        """
        return token_ids(self.tokenizer, write_captions(self.render(messages), captions))

    @property
    def place(self) -> str:
        """Regular expression of what stands for an image in ``render``."""
        return re.escape(IMAGE_TAG)

    def without_places(self, text: str) -> str:
        """``text`` that a model wrote, without anything that stands for an image."""
        return without_tags(text, IMAGE_TAG, *(token for token in self._reserved if is_token(self.tokenizer, token)))

    @functools.cached_property
    def end_token(self) -> str | None:
        """The token that ends an answer; None if it is not one token of the tokenizer."""
        mark = template_named(self.name).end_token
        return mark if ends_answers(self.tokenizer, self.name) else None

    def check_trainable(self) -> None:
        """Raises UserError if the end of an answer could not be learned."""
        if not ends_answers(self.tokenizer, self.name):
            raise UserError(
                f"template {self.name!r} ends an answer with {template_named(self.name).end_token}, which is not a "
                "single token of the tokenizer, so it could not be learned: choose another template"
            )

    def training_text(self, messages: Sequence[Message]) -> TrainingText:
        """The text of a conversation and the spans of its answers, see ``targets.training_text``."""
        found = training_text(self._turns(messages), self.name)
        check_reserved(found.text, self._reserved, self.tokenizer)
        return found

    def tokenize(self, texts: Sequence[TrainingText]) -> list[Example]:
        """Ids and labels of ``texts``, see ``targets.tokenize``."""
        return tokenize(self.tokenizer, texts, self.name)

    @property
    def _reserved(self) -> list[str]:
        return [token for token in (*self.places.placeholders.values(), *self.places.reserved) if token != IMAGE_TAG]

    def _turns(self, messages: Sequence[Message]) -> list[Turn]:
        if messages[0].role == "system":
            raise UserError(
                f"template {self.name!r} has a fixed system prompt: leave the system message out, or choose another "
                "template"
            )
        return turns_of_messages(messages)


PromptTemplate = LlavaTemplate | ModelTemplate


def turns_of_messages(messages: Sequence[Message]) -> list[Turn]:
    """Questions and answers, without the system message; None is the answer that is still to come."""
    questions, answers = ([m.text for m in messages if m.role == role] for role in ("user", "assistant"))
    return list(zip(questions, [*answers, *[None] * (len(questions) - len(answers))], strict=True))


def prompt_template(
    name: str, tokenizer: Any, chat_template: str | None, places: ImagePlaces = LLAVA_PLACES
) -> PromptTemplate:
    """The template of a model.

    Args:
      name: "own", or a name in ``chat_template.TEMPLATES``.
      tokenizer: a transformers tokenizer.
      chat_template: the Jinja source that came with the checkpoint, see ``model_template.find_chat_template``.
      places: what that template writes where an image stands; by default as LLaVA's do.

    Raises:
      UserError: the name is unknown, or the model has no chat template of its own.
    """
    if name != OWN:
        template_named(name)
        return LlavaTemplate(tokenizer, name, places)
    if chat_template is None:
        raise UserError(
            "template 'own' is the model's own chat template, but its folder holds none: copy chat_template.jinja or "
            "tokenizer_config.json from the original checkpoint into it, or choose another template"
        )
    return ModelTemplate(tokenizer, chat_template, places)
