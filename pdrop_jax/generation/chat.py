"""Conversations of several turns, in which each question reuses the KV cache of the turns before it.

Every turn renders and tokenizes the whole conversation again, since a tokenizer may merge tokens across the end of a
turn. The longest common prefix with the cached tokens is not run again: it holds the previous prompt and, if the image
tokens stay, the previous answer as far as its text has the same tokens as the samples. A chat template that writes an
earlier message differently, once others follow, shortens that prefix; if an image is behind it, all runs again.

Caches grow with the bucket of the conversation (``buckets.choose_bucket``). Within a bucket nothing recompiles, and no
array is larger than it would be if the whole conversation was asked at once.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import jax
import numpy as np

from pdrop_jax.batch import Batch
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import (
    ROUNDED,
    State,
    capacity_for,
    check_implementation,
    finish,
    first_token,
    on_devices,
    rows_on_devices,
    stop_ids_of,
)
from pdrop_jax.generation.next_token import TokenSampler, token_sampler
from pdrop_jax.generation.past import Past, empty_past, with_room
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.result import Answer, kept_tokens
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.timer import Timer
from pdrop_jax.generation.watching import Frames, Stream, Watched
from pdrop_jax.inputs.anyres import ImageTokens, captions_of
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER, Turn
from pdrop_jax.inputs.images import Picture
from pdrop_jax.inputs.messages import Message, Prompt, check_order, read_conversation
from pdrop_jax.inputs.processor import as_list
from pdrop_jax.inputs.prompts import turns_of_messages
from pdrop_jax.model import multi_turn
from pdrop_jax.model.cache import cache_bytes
from pdrop_jax.model.decoder import DecodeState
from pdrop_jax.model.drop import DropRecord
from pdrop_jax.model.multi_turn import FirstStage
from pdrop_jax.model.params import Params
from pdrop_jax.model.scores import find_score

Mode = Literal["keep", "rerank"]


class Session:
    """A conversation with a model.

    Example::

        session = pdrop_jax.Session(pdrop_jax.load("model"))
        session.ask("What is on the table?", "kitchen.jpg").text
        session.ask("Who put it there?").text

    Args:
      mode: "rerank": every question selects its own image tokens, and gets the answer that it would get if the whole
        conversation was asked at once; the stages after the first drop run again. "keep": image tokens that an earlier
        question dropped are gone for good, and only new tokens run. See ``model.multi_turn``.
      template: "own" or a name in ``chat_template.TEMPLATES``; None is the checkpoint's.
      implementation: attention implementation, see ``model.attention``.
    """

    def __init__(
        self,
        model: Model,
        mode: Mode = "rerank",
        *,
        template: str | None = None,
        implementation: Implementation = "auto",
    ):
        if mode not in get_args(Mode):
            raise UserError(f"mode must be 'keep' or 'rerank', got {mode!r}")
        check_implementation(implementation)
        if not find_score(model.config).of_stage_output:
            raise UserError(
                f"a conversation cannot use score {model.config.schedule.score!r}: its inputs are not cached"
            )
        self._model = model
        self._mode = mode
        self._prompts = model.processor.prompts(template)
        self._implementation = implementation
        self._messages: list[Message] = []
        self._images: list[ImageTokens] = []
        self._past: Past | None = None
        self._stream: Stream | None = None
        self._asking = threading.Lock()

    @property
    def turns(self) -> list[Turn]:
        """Questions and answers so far, with an ``<image>`` tag for each image."""
        return turns_of_messages(self._messages)

    def __repr__(self) -> str:
        return f"Session({self._model!r}, mode={self._mode!r}, turns={len(self.turns)}, images={len(self._images)})"

    def watch(
        self,
        frames: Frames,
        *,
        window: int | None = None,
        bank: int | None = None,
        ratio: float | None = None,
        question: str | None = None,
    ) -> Watched:
        """Watches frames of a stream; ``ask`` then answers about what is held of it, at any time.

        The newest frames are in focus, with all their tokens. Of a frame that leaves this window, the bank keeps the
        tokens that PyramidDrop keeps longest, or its standby tokens. A question does not see earlier ones.

        Args:
          frames: a ``Video``, a list of pictures or anything that yields them, all of one size.
          window: frames in focus (default: 8, or as many as half of the model's positions hold).
          bank: tokens of the bank in the first stage (default: 8192, or what the model's positions leave).
          ratio: share of a frame's tokens that the bank keeps (default: the schedule's last).
          question: ranks the tokens of a frame when it comes (default: "What happens?").

        Raises:
          UserError: a frame is no picture or differs in size, the window or the bank holds no frame or needs too many
            positions, or a later call changes an option. Frames before a faulty one are watched.
        """
        with self._only_one():
            if self._messages and self._stream is None:
                raise UserError("this session has been asked without a stream: watch with a new one")
            stream = self._stream or Stream(self._model, self._prompts, self._mode == "keep", self._implementation)
            try:
                stream.watch(frames, {"window": window, "bank": bank, "ratio": ratio, "question": question})
            finally:
                self._stream = stream if stream.frames else None
            return stream.watched

    def ask(
        self,
        question: Prompt,
        image: Picture | Sequence[Picture] | None = None,
        sampling: Sampling = Sampling(),
        *,
        stream: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answers the next question of the conversation.

        An error leaves the conversation as it was before the question. After an error in ``stream``, or an interrupt,
        the cache is lost and the next question runs the whole conversation again.

        Args:
          question: text, or messages that are added to the conversation, such as a system message and a question at
            its start; see ``inputs.messages.read_conversation``.
          image: new images, one for each ``<image>`` tag in the question; without tags they precede the question.
          sampling: answer length and sampling; each turn samples with a key of its own, made of the seed and the turn.
          stream: called with new text while the answer grows.

        Raises:
          UserError: a picture cannot be read, image tags and pictures do not match, the messages do not continue the
            conversation, another thread's question is not answered yet, the template cannot hold more turns, or the
            conversation needs more positions than the model
            has. In mode "keep" also if the model's chat template writes an image, or what precedes it, differently as
            the conversation goes on.
        """
        with self._only_one():
            if self._stream:
                messages, answer = self._stream.ask(question, as_list(image), sampling, stream, len(self.turns) + 1)
                self._messages += [*messages, Message("assistant", (self._prompts.without_places(answer.text),))]
                return answer
            return self._ask(question, image, sampling, stream)

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        if not self._asking.acquire(blocking=False):
            raise UserError("this conversation is still answering another question: wait for its answer")
        try:
            yield
        finally:
            self._asking.release()

    def _ask(
        self,
        question: Prompt,
        image: Picture | Sequence[Picture] | None,
        sampling: Sampling,
        stream: Callable[[str], None] | None,
    ) -> Answer:
        max_new_tokens = sampling.max_new_tokens
        processor, config = self._model.processor, self._model.config
        asked, pictures = read_conversation(question, as_list(image))
        messages = [*self._messages, *asked]
        check_order([message.role for message in messages])
        images = [*self._images, *processor.all_tokens(pictures)]
        ids = self._prompts.ids(messages, captions_of(images))

        past = self._past or empty_past(self._model, self._mode == "keep")
        known = _common(past.ids, ids[:-1])
        if IMAGE_PLACEHOLDER in past.ids[known:]:
            if self._mode == "keep":
                raise UserError(
                    "the chat template writes earlier messages differently as the conversation goes on, so that their "
                    'image tokens cannot be kept: use mode "rerank"'
                )
            past, known = empty_past(self._model, False), 0
        back = known - past.asked  # ids differ only after the last image, so these are slots of every stage
        cached = int(past.model.lengths[0][0]) + back
        chunk_ids = ids[known:]
        chunk_row = Row(chunk_ids, _last_images(images, chunk_ids.count(IMAGE_PLACEHOLDER)))
        chunk = assemble([chunk_row], config, choose_bucket([chunk_row], config))
        slots = cached + int(chunk.length[0])
        if slots + max_new_tokens > config.text.max_length:
            raise UserError(
                f"the conversation needs {slots + max_new_tokens} positions ({slots} tokens with this question + "
                f"{max_new_tokens} new tokens) but the model has {config.text.max_length}: start a new one, or ask for "
                "fewer new tokens"
            )
        whole_row = Row(ids, images)
        whole = assemble([whole_row], config, choose_bucket([whole_row], config, max_new_tokens))
        whole.crops = whole.crops[:, :0]

        self._past = None  # until the answer is complete, since the caches are donated
        timer = Timer()
        capacity = capacity_for(max_new_tokens)
        with on_devices(self._model):
            model, first = with_room(past, config, whole, capacity)
            state, first, drops = timer.call(
                _start_turn,
                config,
                self._model.params,
                rows_on_devices(self._model, chunk),
                None if self._mode == "keep" else rows_on_devices(self._model, whole),
                model,
                first,
                np.int32(back),
                jax.random.fold_in(jax.random.key(sampling.seed), sum(message.role == "user" for message in messages)),
                token_sampler(sampling),
                stop_ids_of(self._model),
                slots=whole.bucket.slots,
                capacity=capacity,
                implementation=self._implementation,
            )
            prefill_seconds = timer.lap()
            size = cache_bytes(state.model.caches) + sum(x.nbytes for x in jax.tree.leaves(first))
            send = None if stream is None else lambda row, text: stream(text)
            state, (new,) = finish(self._model, state, sampling, timer, send)
        drawn = int(state.step[0])

        if self._mode == "keep":
            kept = _joined(past.kept, kept_tokens(chunk, jax.device_get(drops))[0])
            # The last sampled token, stop token or not, has not been run through the model.
            self._past = Past([*ids, *new[: drawn - 1]], len(ids), state.model, None, kept)
        else:
            kept = kept_tokens(whole, jax.device_get(drops))[0]
            # The other stages are this turn's.
            index = state.model.index and state.model.index[:1]
            cached_model = dataclasses.replace(state.model, caches=state.model.caches[:1], index=index)
            self._past = Past(ids, len(ids), cached_model, first, kept)
        text = processor.decode(new)
        # A tag that the model wrote has no image.
        self._messages = [*messages, Message("assistant", (self._prompts.without_places(text),))]
        self._images = images
        return Answer(
            text=text,
            token_ids=new,
            stage_lengths=[int(n[0]) for n in jax.device_get(state.model.lengths)],
            kept=kept,
            cached=cached,
            compile_seconds=timer.compile_seconds,
            prefill_seconds=prefill_seconds,
            decode_seconds=timer.lap(),
            cache_bytes=size,
        )


@functools.partial(
    jax.jit,
    static_argnames=("config", "slots", "capacity", "implementation"),
    donate_argnames=("model", "first"),
    compiler_options=ROUNDED,
)
def _start_turn(
    config: LlavaConfig,
    params: Params,
    chunk: Batch,
    whole: Batch | None,
    model: DecodeState,
    first: FirstStage | None,
    back: jax.Array,
    key: jax.Array,
    sampler: TokenSampler,
    stop_ids: jax.Array,
    *,
    slots: int,
    capacity: int,
    implementation: Implementation,
) -> tuple[State, FirstStage | None, tuple[DropRecord, ...]]:
    """Runs a turn up to its first new token.

    Args:
      whole, first: see ``multi_turn.rerank``; None keeps the image tokens of earlier turns.
      model: state after the previous turn, with enough room in its caches.
      slots: slots of the whole conversation.
      back: () int32, number of cached tokens that ``model.lengths`` does not count; negative to discard the last ones.
    """
    lengths = tuple(n + back for n in model.lengths)
    if whole is None or first is None:
        before = dataclasses.replace(model, lengths=lengths)
        logits, after, drops = multi_turn.keep(config, params, chunk, before, slots, implementation=implementation)
    else:
        logits, after, first, drops = multi_turn.rerank(
            config,
            params,
            chunk,
            whole,
            model.caches[0],
            lengths[0],
            first,
            capacity,
            implementation=implementation,
        )
    return first_token(logits, after, capacity, key, sampler, stop_ids), first, drops


def _joined(before: list[list[list[int]]], new: list[list[list[int]]]) -> list[list[list[int]]]:
    """Kept tokens at each stage boundary, of the earlier images and then of the new ones."""
    if not (before and new):
        return before or new
    return [a + b for a, b in zip(before, new, strict=True)]


def _last_images(images: Sequence[ImageTokens], placeholders: int) -> list[ImageTokens]:
    """The images that the last ``placeholders`` stand for."""
    ends = np.cumsum([image.parts for image in images])
    return [image for image, end in zip(images, ends, strict=True) if end > ends[-1] - placeholders]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    differs = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))
