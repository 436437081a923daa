"""A conversation of several turns: each question runs on the cache of those before it.

The tokens of a turn are those of the whole conversation, rendered and tokenized anew. What they have in common with the
tokens in the cache is not run again: the prompt before, and, if the image tokens stay, the answer as far as it was
drawn in the very tokens that its text has. So a tokenizer may merge across the edge of a turn.

Caches grow with the bucket of the conversation (``buckets.choose_bucket``). Within a bucket nothing recompiles, and
nothing is ever larger than it would be for the conversation asked in one.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pdrop_jax.batch import Batch
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import (
    ROUNDED,
    State,
    Timer,
    capacity_for,
    check_implementation,
    finish,
    first_token,
    on_devices,
    rows_on_devices,
)
from pdrop_jax.generation.next_token import TokenSampler, token_sampler
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.result import kept_tokens
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.anyres import ImageTokens
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER, Turn, place_images, render, token_ids, without_tags
from pdrop_jax.inputs.images import Picture
from pdrop_jax.inputs.processor import as_list
from pdrop_jax.model import multi_turn
from pdrop_jax.model.attention import Implementation
from pdrop_jax.model.cache import StageCache, cache_bytes, empty_caches, grow
from pdrop_jax.model.decoder import DecodeState
from pdrop_jax.model.drop import DropRecord
from pdrop_jax.model.params import Params
from pdrop_jax.model.scores import find_score, given

Mode = Literal["keep", "rerank"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one question of a conversation and what it took.

    Attributes:
      text: without the stop token.
      token_ids: of the answer, without the stop token.
      stage_lengths: [stage], tokens of the conversation up to this answer that the stage holds.
      kept: [stage boundary][image of the conversation], indices of the image tokens that stayed, counted within the
        image; empty as long as there is no image.
      cached: tokens of the conversation that were found in the first stage's cache; the others were run.
      compile_seconds: 0 when the shapes were seen before.
      prefill_seconds: up to the first new token.
      decode_seconds: all tokens after the first.
      cache_bytes: size of what the conversation holds on the device.
    """

    text: str
    token_ids: list[int]
    stage_lengths: list[int]
    kept: list[list[list[int]]]
    cached: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int


@dataclasses.dataclass(frozen=True)
class _Past:
    """What a turn leaves to the next.

    Attributes:
      ids: the tokens that are cached; IMAGE_PLACEHOLDER stands for an image.
      asked: how many of them the last prompt had.
      model: caches of all stages, or of the first one only; lengths of the last prompt.
      hidden: (1, S, D), what left the first stage, or None.
      kept: see ``Answer``.
    """

    ids: list[int]
    asked: int
    model: DecodeState
    hidden: jax.Array | None
    kept: list[list[list[int]]]


class Session:
    """A conversation with a model.

    Example::

        session = pdrop_jax.Session(pdrop_jax.load("model"))
        session.ask("What is on the table?", "kitchen.jpg").text
        session.ask("Who put it there?").text

    Args:
      mode: "rerank": every question chooses its own image tokens, and the answer is the one that it would have if the
        whole conversation was asked anew; the stages after the first drop run again. "keep": image tokens that an
        earlier question dropped are gone, and only new tokens run. See ``model.multi_turn``.
      template: a name in ``chat_template.TEMPLATES``; the checkpoint's own if None.

    Attributes:
      turns: questions and answers so far.
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
        score = find_score(model.config)
        if score.last_layer or score.class_attention or score.precompute is given:
            raise UserError(
                f"a conversation cannot be ranked by {model.config.schedule.score!r}: it needs what no cache keeps"
            )
        self.turns: list[Turn] = []
        self._model = model
        self._mode = mode
        self._template = template or model.config.template
        self._implementation = implementation
        self._images: list[ImageTokens] = []
        self._past: _Past | None = None

    def __repr__(self) -> str:
        return f"Session({self._model!r}, mode={self._mode!r}, turns={len(self.turns)}, images={len(self._images)})"

    def ask(
        self,
        question: str,
        image: Picture | Sequence[Picture] | None = None,
        sampling: Sampling = Sampling(),
        *,
        stream: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answers the next question of the conversation.

        An error leaves the conversation as it was before the question. One that comes from ``stream``, or an interrupt,
        costs the cache: the next question runs the whole conversation.

        Args:
          image: new pictures, one for each ``<image>`` tag in the question; without a tag they go in front of it.
          sampling: answer length and sampling; each turn samples with a key of its own, made of the seed and the turn.
          stream: called with new text while the answer grows.

        Raises:
          UserError: unreadable picture, image tags and pictures do not match, more turns than the
            template can hold, a conversation longer than the model's positions.
        """
        max_new_tokens, sampler = sampling.max_new_tokens, token_sampler(sampling)
        processor, config = self._model.processor, self._model.config
        pictures = as_list(image)
        new_row = processor.row([(question, None)], pictures, self._template)
        turns = [*self.turns, *place_images([(question, None)], len(pictures))]
        ids = token_ids(processor.tokenizer, render(turns, self._template))
        images = [*self._images, *new_row.images]

        past = self._past or _nothing(self._model, self._mode)
        known = _common(past.ids, ids[:-1])
        back = known - past.asked  # it is behind the last image that ids can differ: these are slots of every stage
        cached = int(past.model.lengths[0][0]) + back
        chunk_ids = ids[known:]
        chunk_row = Row(chunk_ids, images[len(images) - chunk_ids.count(IMAGE_PLACEHOLDER) :])
        chunk = assemble([chunk_row], config, choose_bucket([chunk_row], config))
        slots = cached + int(chunk.length[0])
        if slots + max_new_tokens > config.text.max_length:
            raise UserError(
                f"the conversation needs {slots + max_new_tokens} positions ({slots} tokens with this question + "
                f"{max_new_tokens} new tokens) but the model has {config.text.max_length}: begin a new one, or ask for "
                "fewer new tokens"
            )
        whole_row = Row(ids, images)
        whole = assemble([whole_row], config, choose_bucket([whole_row], config, max_new_tokens))
        whole.crops = whole.crops[:, :0]

        self._past = None  # till the answer is there: the caches are given away
        stop_ids = np.array(processor.stop_ids, np.int32)
        timer = Timer()
        capacity = capacity_for(max_new_tokens)
        with on_devices(self._model):
            model, hidden = _with_room(past, config, whole, capacity)
            state, hidden, drops = timer.call(
                _start_turn,
                config,
                self._model.params,
                rows_on_devices(self._model, chunk),
                None if self._mode == "keep" else rows_on_devices(self._model, whole),
                model,
                hidden,
                np.int32(back),
                jax.random.fold_in(jax.random.key(sampling.seed), len(turns)),
                sampler,
                stop_ids,
                slots=whole.bucket.slots,
                capacity=capacity,
                implementation=self._implementation,
            )
            prefill_seconds = timer.lap()
            size = cache_bytes(state.model.caches) + (0 if hidden is None else hidden.nbytes)
            send = None if stream is None else lambda row, text: stream(text)
            state, (new,) = finish(self._model, state, max_new_tokens, sampler, stop_ids, timer, send)
        drawn = int(state.step)

        if self._mode == "keep":
            kept = _joined(past.kept, kept_tokens(chunk, jax.device_get(drops))[0])
            # The last token that was drawn has not been through the model, be it a stop token or not.
            self._past = _Past([*ids, *new[: drawn - 1]], len(ids), state.model, None, kept)
        else:
            kept = kept_tokens(whole, jax.device_get(drops))[0]
            first = DecodeState(state.model.caches[:1], state.model.lengths)  # the other caches serve this turn only
            self._past = _Past(ids, len(ids), first, hidden, kept)
        text = processor.decode(new)
        (asked, _), self._images = turns[-1], images
        self.turns.append((asked, without_tags(text)))  # there is no picture for a tag that the model wrote
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
    donate_argnames=("model", "hidden"),
    compiler_options=ROUNDED,
)
def _start_turn(
    config: LlavaConfig,
    params: Params,
    chunk: Batch,
    whole: Batch | None,
    model: DecodeState,
    hidden: jax.Array | None,
    back: jax.Array,
    key: jax.Array,
    sampler: TokenSampler,
    stop_ids: jax.Array,
    *,
    slots: int,
    capacity: int,
    implementation: Implementation,
) -> tuple[State, jax.Array | None, tuple[DropRecord, ...]]:
    """A turn up to its first new token.

    Args:
      whole, hidden: see ``multi_turn.rerank``; without them the image tokens stay.
      model: of the turn before, with room in its caches.
      slots: of the whole conversation.
      back: () int32, tokens that are cached but not counted in ``model.lengths``; negative if the last are to be left.
    """
    lengths = tuple(n + back for n in model.lengths)
    if whole is None or hidden is None:
        before = DecodeState(model.caches, lengths)
        logits, after, drops = multi_turn.keep(config, params, chunk, before, slots, implementation=implementation)
    else:
        logits, after, hidden, drops = multi_turn.rerank(
            config,
            params,
            chunk,
            whole,
            model.caches[0],
            lengths[0],
            hidden,
            capacity,
            implementation=implementation,
        )
    return first_token(logits, after, capacity, key, sampler, stop_ids), hidden, drops


@functools.partial(jax.jit, static_argnames=("sizes", "width"))
def _grown(
    caches: tuple[StageCache | None, ...], hidden: jax.Array | None, sizes: tuple[int, ...], width: int
) -> tuple[tuple[StageCache | None, ...], jax.Array | None]:
    caches = tuple(cache and grow(cache, size) for cache, size in zip(caches, sizes, strict=False))
    return caches, None if hidden is None else jnp.pad(hidden, [(0, 0), (0, width - hidden.shape[1]), (0, 0)])


def _with_room(past: _Past, config: LlavaConfig, whole: Batch, capacity: int) -> tuple[DecodeState, jax.Array | None]:
    """Caches with slots for the conversation and ``capacity`` new tokens, hidden states for the conversation."""
    caches, hidden = past.model.caches, past.hidden
    plan = config.schedule.plan(config.text.num_layers, whole.bucket)
    found = tuple(0 if cache is None else cache.k.shape[3] for cache in caches)
    sizes = tuple(max(n, stage.slots + capacity) for n, stage in zip(found, plan, strict=False))
    width = 0 if hidden is None else max(hidden.shape[1], whole.bucket.slots)
    if found != sizes or (hidden is not None and hidden.shape[1] != width):
        caches, hidden = _grown(caches, hidden, sizes, width)
    return DecodeState(caches, past.model.lengths), hidden


def _nothing(model: Model, mode: Mode) -> _Past:
    """What the first turn finds."""
    config, dtype = model.config, model.params["embed"]["embedding"].dtype
    caches = empty_caches(config, 1, dtype)
    lengths = tuple(jnp.zeros(1, jnp.int32) for _ in caches)
    if mode == "keep":
        return _Past([], 0, DecodeState(caches, lengths), None, [])
    return _Past([], 0, DecodeState(caches[:1], lengths), jnp.zeros((1, 0, config.text.hidden_size), dtype), [])


def _joined(before: list[list[list[int]]], new: list[list[list[int]]]) -> list[list[list[int]]]:
    """What each boundary kept of the images before and of the new ones."""
    if not (before and new):
        return before or new
    return [a + b for a, b in zip(before, new, strict=True)]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that the two have in common."""
    differs = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))
