"""What a server runs: an engine for each drop budget, over the same weights, and the requests in them."""

import asyncio
import contextlib
import dataclasses
import functools
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal, TypeVar

import anyio
import anyio.to_thread
from PIL import Image

from pdrop_jax.batch import Bucket
from pdrop_jax.compilation_cache import CompilationStats
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.requests import Completion, Handle
from pdrop_jax.generation.sampling import NUM_SEEDS
from pdrop_jax.generation.turns import Turns
from pdrop_jax.inputs.anyres import levels
from pdrop_jax.inputs.buckets import prompt_buckets
from pdrop_jax.inputs.download import DownloadRules
from pdrop_jax.inputs.families import FAMILIES
from pdrop_jax.inputs.frames import Standby
from pdrop_jax.serve.constrained import Grammars, grammar_of
from pdrop_jax.serve.conversation import ImageLimits, as_prompt, fetch, image_urls, open_images
from pdrop_jax.serve.metrics import Metrics
from pdrop_jax.serve.protocol import ChatRequest

T = TypeVar("T")
State = Literal["warming up", "ready", "stopping", "failed"]

TEXT_TOKENS = 1024  # of a prompt beside its images, unless the server is told how long prompts may be
IMAGE_TOKENS = 4096  # likewise, where a model's largest picture has more
PIXELS = 2**26  # of all images of a request
DOWNLOADS = 16  # at the same time
# Bytes. glibc returns a block of more than 32 MiB to the system when it is freed. In Pillow's blocks of 16 MiB, large
# pictures that many threads decode leave gigabytes behind.
PICTURE_BLOCK = 2**26
NOTHING = DownloadRules(hosts=())


@dataclasses.dataclass
class Asked:
    """A request in its engine.

    Attributes:
      budget: the name of its drop budget.
      media: its images and videos in order, if details of the answer are asked for.
      handles: one for each of ``n`` answers.
      events: see ``pieces``.
      cancelled: whether nobody waits for the answers any more.
    """

    budget: str
    media: list[Any] = dataclasses.field(default_factory=list)
    handles: list[Handle] = dataclasses.field(default_factory=list)
    events: "asyncio.Queue[tuple[int, str | None]]" = dataclasses.field(default_factory=asyncio.Queue)
    cancelled: bool = False

    async def pieces(self) -> AsyncIterator[tuple[int, str | None]]:
        """(number of the answer, new text), or None at its end, in the order in which they come."""
        ended = 0
        while ended < len(self.handles):
            number, piece = await self.events.get()
            ended += piece is None
            yield number, piece

    async def answers(self) -> list[Completion]:
        """All answers, once they are complete."""
        async for _ in self.pieces():
            pass
        return [handle.result(0) for handle in self.handles]

    def close(self) -> None:
        """Cancels unfinished answers and releases the images.

        The reference cycle between this object and its handles would otherwise keep them until it is collected.
        """
        self.cancelled = True
        self.media.clear()
        for handle in self.handles:
            handle.cancel()


class Service:
    """Engines and what they need to answer HTTP requests.

    Args:
      models: a model for each drop budget; the first is the default.
      slots: of each engine.
      images: largest number of images in a request.
      downloads: what may be downloaded; by default nothing.
      buckets, prefill_rows, max_waiting, image_cache, prefix_cache: of each engine, see ``Engine``.
    """

    def __init__(
        self,
        name: str,
        models: dict[str, Model],
        *,
        slots: int = 8,
        max_new_tokens: int = 256,
        max_prompt_tokens: int | None = None,
        images: int = 4,
        downloads: DownloadRules = NOTHING,
        buckets: Sequence[Bucket] | None = None,
        prefill_rows: int = 4,
        max_waiting: int = 256,
        image_cache: int = 0,
        prefix_cache: int = 0,
        implementation: Implementation = "auto",
    ) -> None:
        model = next(iter(models.values()))
        config = model.config
        if buckets is None:
            most = max_prompt_tokens or _prompt_tokens(config, images)
            buckets = prompt_buckets(config, min(most, config.text.max_length - max_new_tokens), images)
        turns = Turns() if len(models) > 1 else None
        self.name, self.model, self.state = name, model, "warming up"
        self.max_new_tokens, self.models = max_new_tokens, models
        self.engines = {
            budget: Engine(
                each,
                slots,
                max_new_tokens=max_new_tokens,
                buckets=buckets,
                max_waiting=max_waiting,
                prefill_rows=prefill_rows,
                image_cache=image_cache,
                prefix_cache=prefix_cache,
                implementation=implementation,
                extras=True,
                turn=turns,
            )
            for budget, each in models.items()
        }
        self.stats = CompilationStats()
        self.metrics = Metrics(self.engines, self.stats)
        self.limits = ImageLimits(
            count=min(images, max(len(bucket.images) for bucket in buckets)),
            pixels=PIXELS,
            videos=_takes_videos(config),
            downloads=downloads,
        )
        self.active = 0  # requests that have not been answered
        self._grammars = Grammars(model)
        self._computing = anyio.CapacityLimiter(os.cpu_count() or 1)
        self._downloading = anyio.CapacityLimiter(DOWNLOADS)

    state: State

    @property
    def token_bytes(self) -> list[bytes]:
        return self._grammars.tokens

    @property
    def default_budget(self) -> str:
        return next(iter(self.engines))

    def start(self) -> None:
        """Compiles all programs in a thread of its own; then ``state`` is "ready", or "failed"."""
        self.stats.__enter__()
        if "PILLOW_BLOCK_SIZE" not in os.environ:
            Image.core.set_block_size(PICTURE_BLOCK)

        def compile_all() -> None:
            try:
                for engine in self.engines.values():
                    if self.state == "warming up":
                        engine.warm_up()
                if self.state == "warming up":
                    self.state = "ready"
            except BaseException:
                self.state = "failed"
                raise

        self._starting = threading.Thread(target=compile_all, name="pdrop-jax warm-up", daemon=True)
        self._starting.start()

    def close(self) -> None:
        """Ends all engines; what still runs is cancelled."""
        self.state = "stopping"
        if not self._starting.is_alive():
            for engine in self.engines.values():
                engine.close(cancel=True)
        self.stats.__exit__()

    @property
    def compiling(self) -> bool:
        return self._starting.is_alive()

    async def ask(self, request: ChatRequest) -> Asked:
        """Puts a request into the queue of its engine.

        Raises:
          EngineFull: too many requests wait.
          UserError: an image cannot be read or fetched, the prompt is malformed or too long, a value is out of range,
            or there is no such budget.
        """
        budget = request.pdrop or self.default_budget
        if budget not in self.engines:
            raise UserError(f"there is no budget {budget[:40]!r}: this server has {', '.join(self.engines)}")
        urls, asked, loop = image_urls(request, self.limits), Asked(budget), asyncio.get_running_loop()
        found = await asyncio.gather(
            *(_in_thread(self._downloading, fetch, where, url, self.limits) for where, url in urls.items())
        )

        def put(number: int, piece: str | None) -> None:
            loop.call_soon_threadsafe(asked.events.put_nowait, (number, piece))

        def ended(number: int, handle: Handle) -> None:
            with contextlib.suppress(Exception):  # it is reported where the answer is awaited
                self.metrics.answered(budget, handle.result(0))
            put(number, None)

        def submit() -> None:
            images = open_images(dict(zip(urls, found, strict=True)), self.limits)
            prompt = as_prompt(request, images, self.limits)
            if request.pdrop_details:
                shown = [item for message in prompt for item in message["content"] if item["type"] != "text"]
                asked.media += [Standby(x[x["type"]]) if x["mode"] == "standby" else x[x["type"]] for x in shown]
            sampling = request.sampling(self.max_new_tokens, secrets.randbelow(NUM_SEEDS))
            grammar = grammar_of(request)
            for number in range(request.n or 1):
                handle = self.engines[budget].submit(
                    prompt,
                    sampling=sampling.for_batch(number),
                    stream=functools.partial(put, number),
                    stop=request.stop or (),
                    constraint=None if grammar is None else self._grammars.constraint(grammar),
                    top_logprobs=request.reported,
                )
                asked.handles.append(handle)
                handle.add_done_callback(functools.partial(ended, number))
                if asked.cancelled:  # this thread goes on when the task that waits for it is cancelled
                    asked.close()

        try:
            await _in_thread(self._computing, submit)
        except BaseException:
            asked.close()
            raise
        return asked


async def _in_thread(limiter: anyio.CapacityLimiter, call: Callable[..., T], *args: Any) -> T:
    return await anyio.to_thread.run_sync(functools.partial(call, *args), limiter=limiter)


def _prompt_tokens(config: LlavaConfig, images: int) -> int:
    """Length of prompts that are taken by default: a large picture, or several small ones, beside text."""
    known = [tokens for _, tokens in levels(config)]
    return min(max(*known, images * known[0]), IMAGE_TOKENS) + TEXT_TOKENS


def _takes_videos(config: LlavaConfig) -> bool:
    """Whether an engine takes a video as one image; see ``Engine.submit``."""
    family = FAMILIES.get(config.family)
    return bool(family and family.video_tokens) or (family is None and config.features_per_token > 1)
