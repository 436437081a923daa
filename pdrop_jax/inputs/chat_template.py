"""Chat templates: turns of a conversation -> text -> token ids with a placeholder for each image."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tokenizers.pre_tokenizers import Metaspace

from pdrop_jax.errors import UserError

IMAGE_TAG = "<image>"
IMAGE_PLACEHOLDER = -200  # stands for a whole image in a row of token ids, or for a part of one that has captions

Kind = Literal["image", "video"]
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


@dataclasses.dataclass(frozen=True)
class ImagePlaces:
    """What a model's own chat template writes where an image stands.

    Attributes:
      placeholders: for an image and for a video, a token that stands for all of its tokens. A processor of transformers
        calls them ``image_token`` and ``video_token``.
      marks: directly before and after a placeholder; each part of an image with captions has its own.
      writes_marks: whether the template writes them. Otherwise it writes the placeholder alone, in whose place the
        processor puts the marks with the image's tokens between them.
      reserved: further tokens that stand for an image's tokens once the processor has written them.
      video_template: the chat template that transformers' processor takes in place of the model's own in a conversation
        with a video; None is the model's own.
    """

    placeholders: Mapping[Kind, str]
    marks: tuple[str, str] = ("", "")
    writes_marks: bool = True
    reserved: tuple[str, ...] = ()
    video_template: str | None = None


LLAVA_PLACES = ImagePlaces({"image": "<image>", "video": "<video>"})
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
        asked = (parts.first_question if number == 1 else parts.question) + question + parts.asked
        pieces.append((asked, "" if answer is None else parts.answer + answer + parts.answered))
    return pieces


def write_captions(text: str, captions: Sequence[Sequence[str]], place: str = re.escape(IMAGE_TAG)) -> str:
    """``text`` in which an image whose parts stand apart is written out: each part's caption, and a place of its own.

    Args:
      captions: of each image in ``text``, in front of each of its parts and behind the last; empty for an image in one
        part without captions.
      place: regular expression of what stands for an image.
    """
    if not any(captions):
        return text
    images = iter(captions)

    def written(found: re.Match[str]) -> str:
        *before, behind = next(images) or ("", "")
        return "".join(caption + found[0] for caption in before) + behind

    return re.sub(place, written, text)


def without_tags(text: str, *tags: str) -> str:
    """``text`` without ``tags``, including those that form as others are removed: ``<im<image>age>``.

    Args:
      tags: what to remove; by default the ``<image>`` tag.
    """
    tags = tags or (IMAGE_TAG,)
    if not any(tag in text for tag in tags):
        return text
    kept: list[str] = []
    for char in text:
        kept.append(char)
        for tag in tags:
            if char == tag[-1] and "".join(kept[-len(tag) :]) == tag:
                del kept[-len(tag) :]
                break
    return "".join(kept)


def is_token(tokenizer: Any, text: str) -> bool:
    """Whether ``text`` is a token that was added to the vocabulary, so that it is one wherever it is written."""
    return any(str(token) == text for token in tokenizer.added_tokens_decoder.values())


def check_reserved(text: str, reserved: Iterable[str], tokenizer: Any) -> None:
    """Raises UserError if ``text`` has one of ``reserved`` as a token: the model would take it for an image's."""
    for token in reserved:
        if token in text and is_token(tokenizer, token):
            raise UserError(f"the text has {token}, which stands for an image: leave it out of questions and answers")


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
    check_unicode(text)
    chunks = [
        tokenizer(as_sentencepiece(tokenizer, chunk), verbose=False)["input_ids"] for chunk in text.split(IMAGE_TAG)
    ]
    return join_chunks(chunks, surplus_bos(tokenizer, chunks), IMAGE_PLACEHOLDER)


def check_unicode(text: str) -> None:
    """Raises UserError if ``text`` has unpaired surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = text[error.start : error.end]
        raise UserError(f"the text is no valid Unicode at character {error.start + 1}, {wrong!r}") from None


def as_sentencepiece(tokenizer: Any, chunk: str) -> str:
    """The string for which ``tokenizer`` gives sentencepiece's ids of ``chunk``: at most one space is prepended."""
    # sentencepiece prepends a space to any text; the tokenizer in transformers does not if there is one already.
    rebuild = tokenizer.backend_tokenizer.pre_tokenizer
    if chunk.startswith((" ", "▁")) and isinstance(rebuild, Metaspace) and rebuild.prepend_scheme != "never":
        return " " + chunk
    return chunk


def surplus_bos(tokenizer: Any, chunks: Sequence[list[int]]) -> list[int]:
    """How many BOS tokens to remove from the start of each chunk so that the text starts with exactly one.

    Where a template writes the first one and the tokenizer adds none, other chunks have none.
    """
    bos = [tokenizer.bos_token_id]
    first = chunks[0][:1] == bos
    return [int(first and chunks[0][1:2] == bos), *[int(first and chunk[:1] == bos) for chunk in chunks[1:]]]


def join_chunks(chunks: Sequence[list[int]], surplus: Sequence[int], between: int) -> list[int]:
    """The chunks joined by ``between``, each without its first ``surplus`` entries."""
    joined = chunks[0][surplus[0] :]
    for chunk, skip in zip(chunks[1:], surplus[1:], strict=True):
        joined += [between, *chunk[skip:]]
    return joined
