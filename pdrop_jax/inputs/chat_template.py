"""Chat templates: turns of a conversation -> text -> token ids with a placeholder for each image."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tokenizers.pre_tokenizers import Metaspace

from pdrop_jax.errors import UserError

IMAGE_TAG = "<image>"
IMAGE_PLACEHOLDER = -200  # stands for a whole image in a row of token ids

Turn = tuple[str, str | None]  # question and answer; None is the answer that the model has to generate


@dataclasses.dataclass(frozen=True)
class Template:
    """The strings around questions and answers.

    The first turn is ``first_question + q + asked + answer + a + answered``. Later turns use ``question`` in place of
    ``first_question``, which includes the system prompt.
    """

    first_question: str
    question: str
    asked: str
    answer: str
    answered: str
    end_token: str | None = None  # the token with which the model ends its turn
    max_turns: int | None = None
    image: str = IMAGE_TAG  # what stands for an image
    after_image: str = "\n"  # between images that come without tags and the question


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
    # The text that LLaVA-NeXT trains on. Its conversation class writes <|start_header_id|> twice before user.
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
    # "qwen_1_5" in LLaVA-NeXT, shared by its Qwen2 and OneVision models.
    "qwen": Template(
        first_question="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        question="<|im_start|>user\n",
        asked="<|im_end|>\n<|im_start|>assistant\n",
        answer="",
        answered="<|im_end|>\n",
        end_token="<|im_end|>",
    ),
    # The text of Qwen2-VL's and Qwen2.5-VL's own chat template.
    "qwen2_vl": Template(
        first_question="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        question="<|im_start|>user\n",
        asked="<|im_end|>\n<|im_start|>assistant\n",
        answer="",
        answered="<|im_end|>\n",
        end_token="<|im_end|>",
        image=f"<|vision_start|>{IMAGE_TAG}<|vision_end|>",
        after_image="",
    ),
    # The text of Gemma 3's own chat template and processor.
    "gemma3": Template(
        first_question="<start_of_turn>user\n",
        question="<start_of_turn>user\n",
        asked="<end_of_turn>\n<start_of_turn>model\n",
        answer="",
        answered="<end_of_turn>\n",
        end_token="<end_of_turn>",
        image=f"\n\n<start_of_image>{IMAGE_TAG}<end_of_image>\n\n",
        after_image="",
    ),
    # Not part of LLaVA: question and answer without role markers. The demo model was trained with it.
    "bare": Template(first_question="", question="", asked="", answer=" ", answered="</s>", end_token="</s>"),
}


def template_named(name: str) -> Template:
    """Raises UserError for a name that is not in ``TEMPLATES``."""
    if name not in TEMPLATES:
        raise UserError(f"template {name!r} is not known: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(turns: Sequence[Turn], template: str) -> str:
    """The text of a conversation, byte for byte that of LLaVA's own templates.

    Args:
      turns: questions and answers. The last answer may be None; the text then ends where the model continues.
      template: a name in ``TEMPLATES``.

    Raises:
      UserError: there is no turn, more turns than the template supports, or an answer before the last turn is None.
    """
    return "".join(asked + answered for asked, answered in render_turns(turns, template))


def render_turns(turns: Sequence[Turn], template: str) -> list[tuple[str, str]]:
    """``render`` by turn: the text before the answer, and the answer with its markers ("" if it is None)."""
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
        question = question.replace(IMAGE_TAG, parts.image)
        asked = (parts.first_question if number == 1 else parts.question) + question + parts.asked
        pieces.append((asked, "" if answer is None else parts.answer + answer + parts.answered))
    return pieces


def count_tags(turns: Sequence[Turn]) -> int:
    """Number of ``<image>`` tags in questions and answers."""
    return sum((question + (answer or "")).count(IMAGE_TAG) for question, answer in turns)


def place_images(turns: Sequence[Turn], num_images: int, template: str = "vicuna_v1") -> Sequence[Turn]:
    """``turns`` with exactly one ``<image>`` tag per image. If there is no tag, all are put before the first question.

    Args:
      template: a name in ``TEMPLATES``, for what comes between them.

    Raises:
      UserError: there are tags, but their number is not ``num_images``; or the template is unknown.
    """
    tags = count_tags(turns)
    if tags == num_images or not turns:
        return turns
    if tags:
        raise UserError(
            f"the prompt has {_plural(tags, '<image> tag')} but {_plural(num_images, 'picture')}: "
            "give one picture for each tag, or no tag at all"
        )
    (question, answer), *rest = turns
    return [((IMAGE_TAG + template_named(template).after_image) * num_images + question, answer), *rest]


def without_tags(text: str) -> str:
    """``text`` without ``<image>`` tags, including those that form as others are removed: ``<im<image>age>``."""
    kept: list[str] = []
    for char in text if IMAGE_TAG in text else ():
        kept.append(char)
        if char == IMAGE_TAG[-1] and "".join(kept[-len(IMAGE_TAG) :]) == IMAGE_TAG:
            del kept[-len(IMAGE_TAG) :]
    return "".join(kept) if IMAGE_TAG in text else text


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text``, with IMAGE_PLACEHOLDER at each ``<image>`` tag.

    The text is split at the tags and each chunk is tokenized separately, as in LLaVA's training, so a tokenizer that
    has ``<image>`` as a token never produces it. The BOS that the tokenizer puts before each chunk is kept once, at the
    start, even if the text itself starts with it.

    Args:
      tokenizer: a transformers tokenizer.

    Raises:
      UserError: the text has unpaired surrogates, as when the bytes of a command line are not UTF-8.
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
    """The string for which ``tokenizer`` gives sentencepiece's ids of ``chunk``: at most one space is prepended."""
    # sentencepiece prepends a space to any text; the tokenizer in transformers does not if there is one already.
    rebuild = tokenizer.backend_tokenizer.pre_tokenizer
    if chunk.startswith((" ", "▁")) and isinstance(rebuild, Metaspace) and rebuild.prepend_scheme != "never":
        return " " + chunk
    return chunk


def surplus_bos(tokenizer: Any, chunks: Sequence[list[int]]) -> list[int]:
    """How many BOS tokens to remove from the start of each chunk so that the text starts with exactly one."""
    bos = [tokenizer.bos_token_id]
    first = chunks[0][:1] == bos
    return [int(first and chunks[0][1:2] == bos), *[int(first)] * (len(chunks) - 1)]


def join_chunks(chunks: Sequence[list[int]], surplus: Sequence[int], between: int) -> list[int]:
    """The chunks joined by ``between``, each without its first ``surplus`` entries."""
    joined = chunks[0][surplus[0] :]
    for chunk, skip in zip(chunks[1:], surplus[1:], strict=True):
        joined += [between, *chunk[skip:]]
    return joined


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
