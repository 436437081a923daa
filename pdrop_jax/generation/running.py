"""The batch that an ``Engine`` runs: requests in slots, some of which end while others begin. It knows no threads."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pdrop_jax.batch import Batch, Bucket
from pdrop_jax.config import Implementation
from pdrop_jax.generation.engine import (
    STREAM_EVERY,
    committed,
    decode,
    on_devices,
    rows_on_devices,
    stop_ids_of,
    until_stop,
)
from pdrop_jax.generation.logprobs import read_logprobs
from pdrop_jax.generation.next_token import rows_sampler
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.requests import Request
from pdrop_jax.generation.result import kept_tokens, token_scores
from pdrop_jax.generation.reuse import ImageCache, PrefixCache, Reusable, rest_of
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.slots import SlotShape, admit, admit_after, empty_slots
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import power_of_two


class RunningBatch:
    """Requests in the slots of a state on the device.

    Args:
      prefill_rows: a power of two; so many requests of one bucket are prefilled at once.

    Attributes:
      running: the request in each slot that is not free.
      images, prefixes: what earlier requests leave for later ones, or None.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        shape: SlotShape,
        prefill_rows: int,
        implementation: Implementation,
        images: ImageCache | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.running: dict[int, Request] = {}
        self.slots, self.images, self.prefixes = slots, images, prefixes
        self._model = model
        self._stop_ids = stop_ids_of(model)
        self._prefill_rows = prefill_rows
        self._implementation: Implementation = implementation
        self._extras = shape.top_logprobs > 0
        self._unsent: list[Callable[[], None]] = []
        self._words = -(-model.config.text.vocab_size // 32)
        with on_devices(model):
            self._state: Any = committed(model, empty_slots(model.config, slots, shape, model.dtype))

    @property
    def free(self) -> int:
        return self.slots - len(self.running)

    def compile(self, buckets: Sequence[Bucket]) -> None:
        """Compiles all programs for requests in ``buckets``, with a progress bar. Nothing may be running."""
        rows = [1 << n for n in range(self._prefill_rows.bit_length())]
        config, processor = self._model.config, self._model.processor
        shown = [bucket for bucket in buckets if bucket.images]
        programs = [(bucket, False, False) for bucket in buckets]  # bucket, recall, standby
        programs += [(bucket, True, False) for bucket in shown if self.prefixes]
        programs += [(bucket, False, True) for bucket in shown if config.standby]
        todo = [(*program, count) for program in programs for count in rows]
        with on_devices(self._model), tqdm(todo, "compiling", unit=" programs", disable=None, leave=False) as bar:
            if self.images:
                self.images.compile()
            for bucket, recall, standby, count in bar:
                reusable, batch = Reusable(rest=rest_of([0], config, bucket)), assemble([Row([0])], config, bucket)
                if standby:
                    batch = dataclasses.replace(batch, clips=np.zeros((1, bucket.crops), np.int32))
                request = Request.of(batch, Sampling(), processor, reusable)
                self._prefill([request] * count, [0] * count, recall)
            self._decode()
            if self._extras:
                self._decode(extras=True)
            jax.block_until_ready(self._state)

    def admit(self, requests: Sequence[Request]) -> None:
        """Prefills as many requests as there are free slots, or fewer."""
        free = (slot for slot in range(self.slots) if slot not in self.running)
        new = dict(zip(free, requests, strict=False))
        self.running |= new
        alike: dict[tuple[Bucket, bool], list[int]] = {}
        for slot, request in new.items():
            alike.setdefault((request.batch.bucket, request.batch.clips is None), []).append(slot)
        for slots in alike.values():
            self._admit_alike({slot: new[slot] for slot in slots})
        self._collect()

    def release(self) -> None:
        """Gives the memory of slots and caches back."""
        self._state = self.images = self.prefixes = None

    def step(self) -> None:
        """Decodes a few tokens of all requests. They are passed on while the device works on what comes next."""
        if any(request.constraint for request in self.running.values()):
            self.pass_on()  # what is allowed next depends on them
        if self.running:
            self._decode(extras=not all(request.plain for request in self.running.values()))
            self.pass_on()
            self._collect()

    def pass_on(self) -> None:
        """Passes on the tokens that are there already. Requests that end leave ``running``."""
        unsent, self._unsent = self._unsent, []
        for send in unsent:
            send()

    def _admit_alike(self, requests: dict[int, Request]) -> None:
        """Prefills requests of one bucket that all have standby tokens or all have none.

        A request whose prefix is new comes before others with the same prefix.
        """
        prefixes, waves = self.prefixes, [list(requests)]
        if prefixes:
            waves = prefixes.waves({slot: request.reusable for slot, request in requests.items()})
        for wave in waves:
            recalled = [slot for slot in wave if prefixes and prefixes.holds(requests[slot].reusable)]
            others = [slot for slot in wave if slot not in recalled]
            for slots, recall in ((recalled, True), (others, False)):  # others may take the place of what is recalled
                for at in range(0, len(slots), self._prefill_rows):
                    part = slots[at : at + self._prefill_rows]
                    self._prefill([requests[slot] for slot in part], part, recall)

    def _prefill(self, requests: list[Request], slots: list[int], recall: bool) -> None:
        """Prefills requests that are alike; with ``recall`` the first stage of their prefixes is cached."""
        now, count = time.perf_counter(), len(requests)
        rows = np.minimum(np.arange(power_of_two(count)), count - 1)  # the last one is repeated as padding
        padded = [requests[r] for r in rows]
        batch, reusable = joined([request.batch for request in padded]), [request.reusable for request in requests]
        model, shown = self._model, len(batch.bucket.images)
        prefixes, images = (self.prefixes, self.images) if shown else (None, None)
        entries = prefixes.entries(reusable)[rows] if prefixes else None
        common = (
            np.array(slots, np.int32)[rows],
            np.array([request.sampling.seed for request in padded], np.uint32),
            rows_sampler([request.sampling for request in padded]),
            self._stop_ids,
            self._allowed(dict(enumerate(padded)), len(padded)) if self._extras else None,
        )
        if recall:
            assert prefixes
            self._state, lengths, drops = admit_after(
                model.config,
                model.params,
                self._state,
                rows_on_devices(model, without_crops(batch)),
                *common,
                prefixes.pool,
                entries,
                np.array([request.prefix_slots for request in reusable], np.int32)[rows],
                rows_on_devices(model, joined([reusable[r].rest for r in rows])),
                implementation=self._implementation,
            )
        else:
            pictures = None
            if images and batch.clips is None:
                found = images.entries(reusable, shown)[rows]
                pictures, batch = (images.pool, found), without_crops(batch)
            self._state, pool, lengths, drops = admit(
                model.config,
                model.params,
                self._state,
                rows_on_devices(model, batch),
                *common,
                pictures,
                prefixes and prefixes.pool,
                entries,
                implementation=self._implementation,
            )
            if prefixes:
                prefixes.pool = pool
        lengths, drops = jax.device_get((lengths, drops))
        stage_lengths, kept = np.stack(lengths, axis=1).tolist(), kept_tokens(batch, drops)
        scores = token_scores(batch, drops)
        for r, request in enumerate(requests):
            request.admitted, request.stage_lengths = now, stage_lengths[r]
            request.kept, request.scores = kept[r], scores[r]
            request.cached = reusable[r].prefix_slots if recall else 0

    def _allowed(self, requests: Mapping[int, Request], rows: int) -> np.ndarray:
        """See ``next_token.only``; rows without a constraint may have any token."""
        allowed = np.full((rows, self._words), -1, np.int32)
        for row, request in requests.items():
            if request.allowed is not None:
                allowed[row] = request.allowed
        return allowed

    def _decode(self, extras: bool = False) -> None:
        """
        Args:
          extras: with log-probabilities and constraints. These know only one token ahead what they allow.
        """
        constrained = any(request.constraint for request in self.running.values())
        every = 1 if constrained else STREAM_EVERY
        until, samplings = np.zeros(self.slots, np.int32), [Sampling()] * self.slots
        for slot, request in self.running.items():
            samplings[slot] = request.sampling
            until[slot] = min(request.step + every, request.sampling.max_new_tokens)
        self._state = decode(
            self._model.config,
            self._model.params,
            self._state,
            until,
            rows_sampler(samplings),
            self._stop_ids,
            self._allowed(self.running, self.slots) if extras else None,
        )

    def _collect(self) -> None:
        """Reads the new tokens, which ``pass_on`` passes on. Slots whose answers are complete are free from then on."""
        asked = any(request.top_logprobs is not None for request in self.running.values())
        state = self._state
        steps, done, tokens, logprobs = jax.device_get(
            (state.step, state.done, state.tokens, state.logprobs if asked else None)
        )
        for slot, request in list(self.running.items()):
            request.step = step = int(steps[slot])
            ids, stopped = until_stop(tokens[slot, :step], self._stop_ids), bool(done[slot])
            self._unsent.append(functools.partial(self._send, request, slot, ids, stopped, logprobs))
            if stopped or step >= request.sampling.max_new_tokens:
                del self.running[slot]

    def _send(self, request: Request, slot: int, ids: list[int], stopped: bool, logprobs: Any) -> None:
        most, new = request.top_logprobs, []
        if most is not None:
            new = read_logprobs(logprobs, slot, range(len(request.ids), len(ids)), ids, most)
        try:
            ended = request.take(ids, stopped, new)
        except Exception as error:  # of the caller's stream or constraint
            request.handle.finish(error)
            ended = True
        if ended and self.running.get(slot) is request:
            del self.running[slot]


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of batches of one bucket as one batch."""
    return jax.tree.map(lambda *rows: np.concatenate(rows), *batches)


def without_crops(batch: Batch) -> Batch:
    layout = None if batch.patch_layout is None else batch.patch_layout[:, :0]
    return dataclasses.replace(batch, crops=batch.crops[:, :0], patch_layout=layout, clips=None)
