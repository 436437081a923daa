"""Chat templates: turns of a conversation -> text -> token ids with a placeholder for each image."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tokenizers.pre_tokenizers import Metaspace

from pdrop_jax.errors import UserError

IMAGE_TAG = "<image>"
IMAGE_PLACEHOLDER = -200  # stands for a whole image in a row of token ids

Turn = tuple[str, str | None]  # question and answer; the answer to be generated is None


@dataclasses.dataclass(frozen=True)
class Template:
    """The strings around questions and answers.

    A conversation is ``first_question + q + asked``, then ``answer + a + answered``, and for every later turn the
    same with ``question`` in place of ``first_question``, which holds the system prompt as well.
    """

    first_question: str
    question: str
    asked: str
    answer: str
    answered: str
    end_token: str | None = None  # the token that ends the model's turn
    max_turns: int | None = None


TEMPLATES = {
    "vicuna_v1": Template(
        first_question=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
        ),
        question="USER: ",
        asked=" ASSISTANT:",
        answer=" ",
        answered="</s>",
        end_token="</s>",
    ),
    "llava_llama_2": Template(
        first_question=(
            "[INST] <<SYS>>\nYou are a helpful language and vision assistant. "
            "You are able to understand the visual content that the user provides, "
            "and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
        ),
        question="<s>[INST] ",
        asked=" [/INST]",
        answer=" ",
        answered=" </s>",
        end_token="</s>",
    ),
    "mistral_instruct": Template(
        first_question="[INST] ",
        question="[INST] ",
        asked=" [/INST]",
        answer=" ",
        answered=" </s>",
        end_token="</s>",
    ),
    "plain": Template(first_question="", question="", asked="\n", answer="", answered="\n", max_turns=1),
    "chatml_direct": Template(
        first_question="<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n",
        question="<|im_start|>user\n",
        asked="<|im_end|><|im_start|>assistant\n",
        answer="",
        answered="<|im_end|>",
        end_token="<|im_end|>",
    ),
    # The text that LLaVA-NeXT trains on. Its own conversation class writes <|start_header_id|> twice before user.
    "llama_3": Template(
        first_question=(
            "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
            "You are able to understand the visual content that the user provides, "
            "and assist the user with a variety of tasks using natural language.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n"
        ),
        question="<|start_header_id|>user<|end_header_id|>\n\n",
        asked="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="",
        answered="<|eot_id|>",
        end_token="<|eot_id|>",
    ),
    # "qwen_1_5" of LLaVA-NeXT, which its Qwen2 and OneVision models share.
    "qwen": Template(
        first_question="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        question="<|im_start|>user\n",
        asked="<|im_end|>\n<|im_start|>assistant\n",
        answer="",
        answered="<|im_end|>\n",
        end_token="<|im_end|>",
    ),
    # Not of LLaVA: a question and its answer without any mark of who speaks, as the demo's model was taught.
    "bare": Template(first_question="", question="", asked="", answer=" ", answered="</s>", end_token="</s>"),
}


def template_named(name: str) -> Template:
    """Raises UserError for a name that is not in ``TEMPLATES``."""
    if name not in TEMPLATES:
        raise UserError(f"template {name!r} is not known: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(turns: Sequence[Turn], template: str) -> str:
    """The text of a conversation, byte for byte as LLaVA's own templates give it.

    Args:
      turns: questions and answers. An answer of None, allowed in the last turn, leaves the text at the point where the
        model goes on.
      template: a name in ``TEMPLATES``.

    Raises:
      UserError: no turn, more turns than the template can hold, an answer that is missing before the last turn.
    """
    return "".join(asked + answered for asked, answered in render_turns(turns, template))


def render_turns(turns: Sequence[Turn], template: str) -> list[tuple[str, str]]:
    """``render`` in pieces: of each turn the text up to its answer, and the answer with its marks, "" without one."""
    parts = template_named(template)
    if not turns:
        raise UserError("a conversation needs at least one question, got none")
    if parts.max_turns is not None and len(turns) > parts.max_turns:
        raise UserError(
            f"template {template!r} holds {parts.max_turns} turn, got {len(turns)}: choose another template"
        )
    pieces = []
    for number, (question, answer) in enumerate(turns, 1):
        if answer is None and number < len(turns):
            raise UserError(f"turn {number} of {len(turns)} has no answer: only the last one may lack it")
        asked = (parts.first_question if number == 1 else parts.question) + question + parts.asked
        pieces.append((asked, "" if answer is None else parts.answer + answer + parts.answered))
    return pieces


def place_images(turns: Sequence[Turn], num_images: int) -> Sequence[Turn]:
    """``turns`` with exactly one ``<image>`` tag per picture; without any tag they go in front of the first question.

    Raises:
      UserError: there are tags, but not as many as pictures.
    """
    tags = sum((question + (answer or "")).count(IMAGE_TAG) for question, answer in turns)
    if tags == num_images or not turns:
        return turns
    if tags:
        raise UserError(
            f"the prompt has {_plural(tags, '<image> tag')} but {_plural(num_images, 'picture')}: "
            "give one picture for each tag, or no tag at all"
        )
    (question, answer), *rest = turns
    return [(f"{IMAGE_TAG}\n" * num_images + question, answer), *rest]


def without_tags(text: str) -> str:
    """``text`` without ``<image>`` tags, also without those that form when others are taken out: ``<im<image>age>``."""
    kept: list[str] = []
    for char in text if IMAGE_TAG in text else ():
        kept.append(char)
        if char == IMAGE_TAG[-1] and "".join(kept[-len(IMAGE_TAG) :]) == IMAGE_TAG:
            del kept[-len(IMAGE_TAG) :]
    return "".join(kept) if IMAGE_TAG in text else text


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text``, with IMAGE_PLACEHOLDER at each ``<image>`` tag.

    The text is split at the tags and every chunk is tokenized by itself, as LLaVA was trained, so even a tokenizer
    that knows ``<image>`` as a token never produces it. A BOS that the tokenizer puts in front of each chunk is kept
    once, at the start, also if the text itself starts with it.

    Args:
      tokenizer: a transformers tokenizer.

    Raises:
      UserError: the text holds half surrogate pairs, as a command line does whose bytes are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = text[error.start : error.end]
        raise UserError(f"the text is no valid Unicode at character {error.start + 1}, {wrong!r}") from None
    chunks = [
        tokenizer(as_sentencepiece(tokenizer, chunk), verbose=False)["input_ids"] for chunk in text.split(IMAGE_TAG)
    ]
    return join_chunks(chunks, surplus_bos(tokenizer, chunks), IMAGE_PLACEHOLDER)


def as_sentencepiece(tokenizer: Any, chunk: str) -> str:
    """What to hand to ``tokenizer`` to get sentencepiece's ids of ``chunk``: at most one space more in front."""
    # sentencepiece puts a space in front of any text; its rebuild in transformers skips that if there is one already.
    rebuild = tokenizer.backend_tokenizer.pre_tokenizer
    if chunk.startswith((" ", "▁")) and isinstance(rebuild, Metaspace) and rebuild.prepend_scheme != "never":
        return " " + chunk
    return chunk


def surplus_bos(tokenizer: Any, chunks: Sequence[list[int]]) -> list[int]:
    """For the ids of each chunk of a text, how many BOS to take off its front so that the text begins with just one."""
    bos = [tokenizer.bos_token_id]
    first = chunks[0][:1] == bos
    return [int(first and chunks[0][1:2] == bos), *[int(first)] * (len(chunks) - 1)]


def join_chunks(chunks: Sequence[list[int]], surplus: Sequence[int], between: int) -> list[int]:
    """The chunks in a row with ``between`` in every gap, each without its first ``surplus`` entries."""
    joined = chunks[0][surplus[0] :]
    for chunk, skip in zip(chunks[1:], surplus[1:], strict=True):
        joined += [between, *chunk[skip:]]
    return joined


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
