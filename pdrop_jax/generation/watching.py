"""Streams of frames on the host: ``Session.watch``."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pdrop_jax.batch import Batch, Bucket
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import (
    ROUNDED,
    State,
    capacity_for,
    finish,
    first_token,
    on_devices,
    rows_on_devices,
    stop_ids_of,
)
from pdrop_jax.generation.next_token import TokenSampler, token_sampler
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.result import Answer
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.timer import Timer
from pdrop_jax.inputs.anyres import ImageTokens, captions_of
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.frames import frame_tokens, open_frames, with_standby
from pdrop_jax.inputs.images import Picture, Video
from pdrop_jax.inputs.messages import Medium, Message, Prompt, read_conversation
from pdrop_jax.inputs.prompts import PromptTemplate
from pdrop_jax.model import streaming
from pdrop_jax.model.cache import cache_bytes
from pdrop_jax.model.params import Params
from pdrop_jax.model.ring import Layout
from pdrop_jax.model.scores import find_score
from pdrop_jax.model.streaming import StreamState
from pdrop_jax.schedule import keep_count

Frames = Video | Iterable[Picture]
QUESTION = "What happens?"  # ranks the tokens of a frame while no other question is known
WINDOW = 8  # frames, if the model has the positions
BANK = 8192  # tokens, likewise


@dataclasses.dataclass(frozen=True)
class Watched:
    """What a session holds of its stream.

    Attributes:
      frames: number of frames watched so far.
      window: how many of them are in focus, with all their tokens.
      bank: how many of those before are in the bank.
      tokens: [stage], tokens that the stage holds, the text in front of the frames included.
      cache_bytes: device memory that the stream takes, however long it is.
    """

    frames: int
    window: int
    bank: int
    tokens: list[int]
    cache_bytes: int


@dataclasses.dataclass(frozen=True)
class WatchOptions:
    """See ``Session.watch``."""

    window: int | None = None
    bank: int | None = None
    ratio: float | None = None
    question: str = QUESTION

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"the window must hold at least 1 frame, got {self.window}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UserError(f"the bank's ratio must be above 0 and at most 1, got {self.ratio}")


class Stream:
    """A stream of frames that a model watches.

    Args:
      keeps_images: mode "keep", see ``Session``.
    """

    def __init__(self, model: Model, prompts: PromptTemplate, keeps_images: bool, implementation: Implementation):
        if not keeps_images:
            _check_rerank(model.config)
        self._model, self._prompts, self._implementation = model, prompts, implementation
        self._keeps_images = keeps_images
        self.frames = 0

    def watch(self, frames: Frames, options: Mapping[str, Any]) -> None:
        """Watches more frames. Arguments, of which None is not given, and errors are those of ``Session.watch``."""
        given = {name: value for name, value in options.items() if value is not None}
        size = None
        if not self.frames:
            self._options = WatchOptions(**given)
        elif any(getattr(self._options, name) != value for name, value in given.items()):
            raise UserError("window, bank, ratio and question of a stream are set by the first call of watch")
        else:
            size = self._size
        for frame in open_frames(frames, size, self.frames):
            if not self.frames:
                self._begin(frame)
            self._see(frame)
        if not self.frames:
            raise UserError("a stream needs at least one frame, got none")
        jax.block_until_ready(self._state)

    def _begin(self, first: Image.Image) -> None:
        config, model = self._model.config, self._model
        self._size = first.size
        image = self._tokens(first)
        self._captions = captions_of([image])
        ids = self._ids([Message("user", (Medium(), self._options.question))])
        at = ids.index(IMAGE_PLACEHOLDER)
        self._prefix, self._tail = ids[:at], ids[at + 1 :]
        self.layout = _layout(config, image, self._options, len(self._prefix), len(self._tail))
        positions = np.arange(self.layout.frame) if image.positions is None else image.positions
        self._offsets = positions.astype(np.int32)
        prefix = assemble([Row(self._prefix)], config, Bucket(self.layout.prefix))
        with on_devices(model):
            prefix = rows_on_devices(model, prefix)
            self._state = _begin(
                config, model.params, self.layout, prefix, self._offsets, keeps_images=self._keeps_images
            )

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        return self._prompts.ids(messages, self._captions)

    def _tokens(self, frame: Image.Image) -> ImageTokens:
        config = self._model.config
        image = frame_tokens(frame, self._model.processor.image_processor, config)
        return with_standby(image, config) if config.standby else image

    def _batch(self, frame: Image.Image) -> Batch:
        """A frame with the standing question behind it, without padding."""
        layout, image = self.layout, self._tokens(frame)
        bucket = Bucket(layout.text + layout.standby, (layout.frame - layout.standby,), len(image.crops))
        return assemble([Row([IMAGE_PLACEHOLDER, *self._tail], [image])], self._model.config, bucket)

    def _see(self, frame: Image.Image) -> None:
        model, batch = self._model, self._batch(frame)
        jax.block_until_ready(self._state)  # the frame before: no more than one waits for the device
        with on_devices(model):
            batch = rows_on_devices(model, batch)
            self._state = _watch(model.config, model.params, self.layout, self._state, batch, self._offsets)
        self.frames += 1

    @property
    def watched(self) -> Watched:
        layout = self.layout
        window = min(self.frames, layout.window)
        bank = min(self.frames - window, layout.bank)
        counts = layout.counts(self._model.config)[: len(self._state.caches)]
        return Watched(
            frames=self.frames,
            window=window,
            bank=bank,
            tokens=[layout.prefix + bank * b + window * n for n, b in counts],
            cache_bytes=sum(x.nbytes for x in jax.tree.leaves(self._state)),
        )

    def ask(
        self,
        question: Prompt,
        pictures: Sequence[Any],
        sampling: Sampling,
        stream: Callable[[str], None] | None,
        turn: int,
    ) -> tuple[list[Message], Answer]:
        """The messages of a question, which are all that the model sees beside what is held, and the answer.

        Arguments and errors are those of ``Session.ask``; ``turn`` counts the questions, for sampling.
        """
        messages, pictures = read_conversation(question, pictures)
        if pictures:
            raise UserError("a session that watches a stream takes no other pictures: start a new one for them")
        first = next(number for number, message in enumerate(messages) if message.role == "user")
        messages[first] = Message("user", (Medium(), *messages[first].parts))
        key = jax.random.fold_in(jax.random.key(sampling.seed), turn)
        return messages, self._answer(messages, sampling, key, stream)

    def _answer(
        self, messages: Sequence[Message], sampling: Sampling, key: jax.Array, stream: Callable[[str], None] | None
    ) -> Answer:
        model, config, layout = self._model, self._model.config, self.layout
        ids = self._ids(messages)
        at = ids.index(IMAGE_PLACEHOLDER)
        if ids[:at] != self._prefix:
            raise UserError(
                "the chat template writes something else in front of the frames for these messages than for a "
                "question: ask a plain question, without a system message or earlier turns"
            )
        row = Row(ids[at + 1 :])
        held, max_new_tokens = self.watched, sampling.max_new_tokens
        needed = layout.positions(config) + len(row.ids) + max_new_tokens
        if needed > config.text.max_length:
            raise UserError(
                f"the question needs {needed} positions ({layout.positions(config)} of the stream + {len(row.ids)} "
                f"tokens of text + {max_new_tokens} new tokens), but the model has {config.text.max_length}: ask for "
                "fewer new tokens, or watch with a smaller window or bank"
            )
        chunk = assemble([row], config, choose_bucket([row], config))
        timer, capacity = Timer(), capacity_for(max_new_tokens)
        with on_devices(model):
            state = timer.call(
                _answer,
                config,
                model.params,
                layout,
                self._state,
                rows_on_devices(model, chunk),
                self._offsets,
                key,
                token_sampler(sampling),
                stop_ids_of(model),
                capacity=capacity,
                implementation=self._implementation,
            )
            prefill_seconds = timer.lap()
            size = held.cache_bytes + cache_bytes(state.model.caches)
            send = None if stream is None else lambda row, text: stream(text)
            lengths = [int(n[0]) for n in jax.device_get(state.model.lengths)]
            state, (new,) = finish(model, state, sampling, timer, send)
        return Answer(
            text=model.processor.decode(new),
            token_ids=new,
            stage_lengths=lengths,
            kept=[],
            cached=held.tokens[0],
            compile_seconds=timer.compile_seconds,
            prefill_seconds=prefill_seconds,
            decode_seconds=timer.lap(),
            cache_bytes=size,
        )


def _check_rerank(config: LlavaConfig) -> None:
    """Raises UserError if what later stages need of a frame is not kept in mode "rerank"."""
    drops = config.schedule.layers
    if drops and (drops[0] < config.additions or find_score(config).precompute):
        needs = f"score {config.schedule.score!r}" if find_score(config).precompute else "a drop before DeepStack ends"
        raise UserError(f'{needs} needs more of a frame than its first stage: watch with Session(model, mode="keep")')


def _layout(config: LlavaConfig, image: ImageTokens, options: WatchOptions, prefix: int, text: int) -> Layout:
    """The sizes of a stream. UserError if the bank holds no frame, or the model has too few positions."""
    n, most = len(image), config.text.max_length
    extent = image.extent if config.text.mrope_sections else n
    ratio = options.ratio if options.ratio is not None else min([r for r in config.schedule.ratios if r], default=0.125)
    kept = image.standby or max(1, keep_count(n, ratio))
    if image.standby and options.ratio is not None:
        raise UserError(f"the bank of this model holds its {kept} standby tokens of a frame: leave ratio out")
    spare = min(256, most // 4)  # positions for questions and answers

    def layout(window: int, bank: int) -> Layout:
        return Layout(prefix, n, image.standby, extent, kept, window, bank, text)

    def room(window: int, bank: int) -> int:
        return most - text - layout(window, bank).positions(config)

    window = options.window or max(1, max((w for w in range(1, WINDOW + 1) if 2 * room(w, 0) >= most), default=1))
    if options.bank is not None:
        bank = options.bank // kept
        if bank < 1:
            raise UserError(
                f"a bank of {options.bank} tokens is smaller than one frame, of which it holds {kept} of {n} tokens: "
                "raise bank or lower ratio"
            )
    else:
        a_frame = layout(1, 1).positions(config) - layout(1, 0).positions(config)
        bank = max(1, min(BANK // kept, (room(window, 0) - spare) // a_frame))
    if room(window, bank) <= 0:
        raise UserError(
            f"a window of {window} frames and a bank of {bank} need {layout(window, bank).positions(config) + text} "
            f"positions with the standing question, but the model has {most}: lower window or bank"
        )
    return layout(window, bank)


_jit = functools.partial(jax.jit, compiler_options=ROUNDED)
_begin = _jit(streaming.begin, static_argnames=("config", "layout", "keeps_images"))
_watch = _jit(streaming.watch, static_argnames=("config", "layout"), donate_argnames=("state",))


@functools.partial(
    jax.jit, static_argnames=("config", "layout", "capacity", "implementation"), compiler_options=ROUNDED
)
def _answer(
    config: LlavaConfig,
    params: Params,
    layout: Layout,
    state: StreamState,
    chunk: Batch,
    offsets: jax.Array,
    key: jax.Array,
    sampler: TokenSampler,
    stop_ids: jax.Array,
    *,
    capacity: int,
    implementation: Implementation,
) -> State:
    """Runs a question up to its first new token."""
    logits, model, _ = streaming.answer(
        config, params, layout, state, chunk, jnp.asarray(offsets), capacity, implementation=implementation
    )
    return first_token(logits, model, capacity, key, sampler, stop_ids)
