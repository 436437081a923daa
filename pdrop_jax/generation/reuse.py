"""What requests to an engine have in common with earlier ones: pictures, and beginnings up to a picture.

Both caches are bounded by bytes given in advance and forget what has not been used for the longest time. Their keys are
SHA-256 of what the model sees, pixels and token ids, never of a path.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from pdrop_jax.batch import Batch, Bucket
from pdrop_jax.config import Implementation, LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import committed, on_devices, rows_on_devices
from pdrop_jax.generation.lru import CacheCounts, Lru
from pdrop_jax.generation.pools import empty_images, empty_prefixes, encode, pool_bytes
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.inputs.anyres import ImageTokens
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.images import blank
from pdrop_jax.model.attention import aligned
from pdrop_jax.model.scores import find_score


@dataclasses.dataclass(frozen=True)
class Reusable:
    """What of a request may have been computed before.

    Attributes:
      images, keys: the pictures and their keys.
      prefix: key of the prompt up to the end of its last picture; None if there is none, or nothing behind it.
      prefix_slots: tokens of the prefix.
      rest: the tokens behind it, as a batch of one row.
    """

    images: Sequence[ImageTokens] = ()
    keys: Sequence[bytes] = ()
    prefix: bytes | None = None
    prefix_slots: int = 0
    rest: Batch | None = None

    @classmethod
    def of(cls, row: Row, config: LlavaConfig, bucket: Bucket) -> "Reusable":
        if not row.images:
            return cls()
        keys, ids = [image_key(image) for image in row.images], np.asarray(row.ids, np.int32)
        end = int(np.flatnonzero(ids == IMAGE_PLACEHOLDER)[-1]) + 1
        if end == len(ids):
            return cls(row.images, keys)
        prefix = hashlib.sha256(ids[:end].tobytes() + b"".join(keys)).digest()
        slots = int((ids[:end] != IMAGE_PLACEHOLDER).sum()) + sum(map(len, row.images))
        return cls(row.images, keys, prefix, slots, rest_of(ids[end:], config, bucket))


def rest_of(ids: Sequence[int] | np.ndarray, config: LlavaConfig, bucket: Bucket) -> Batch:
    """The tokens behind a prefix, text alone, of a prompt in ``bucket``."""
    return assemble([Row(ids)], config, Bucket(bucket.text))


def image_key(image: ImageTokens) -> bytes:
    """SHA-256 of a processed picture: its pixels, and how tokens are formed from their features.

    The key includes the number of standby tokens, whose indices look like those of patches.
    """
    digest = hashlib.sha256(f"{image.standby} {image.video}".encode())
    for array in (image.crops, image.index, image.weight, image.layout, image.positions):
        digest.update(b"none" if array is None else f"{array.dtype}{array.shape}".encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


class ImageCache:
    """Embeddings of the tokens of pictures on the device.

    Every picture is encoded alone, by the program of the smallest of a few shapes that holds it. So what a request
    reads is the same, bit by bit, whether an earlier one had the picture or not, and whatever shares its batch.
    Prompts with standby tokens (``inputs.frames.Standby``) do without it: their pictures are encoded with the prompt.

    Args:
      buckets: of the requests.
      nbytes: device memory that the cache may take.
      rows: prompts that are prefilled at once: all their pictures must be there.
    """

    def __init__(
        self, model: Model, buckets: Sequence[Bucket], nbytes: int, rows: int, implementation: Implementation
    ) -> None:
        self._model, self._implementation = model, implementation
        # A picture of a bucket has the crops that the bucket's other pictures leave, or all of them if it is alone.
        others = {bucket: {0, min(len(bucket.images), bucket.crops) - 1} for bucket in buckets if bucket.images}
        shapes = {(n, bucket.crops - m) for bucket, crops in others.items() for n in bucket.images for m in crops}
        self._shapes = [Bucket(0, (tokens,), crops) for tokens, crops in sorted(shapes)]
        tokens, needed = max(shapes)[0], rows * max(len(bucket.images) for bucket in buckets)
        one = pool_bytes(empty_images, model.config, 1, tokens, model.dtype)
        check_room("image_cache", nbytes, one, needed, "pictures")
        self._lru = Lru(nbytes // one)
        with on_devices(model):
            self.pool = committed(model, empty_images(model.config, self._lru.capacity, tokens, model.dtype))
        self.nbytes = one * self._lru.capacity

    @property
    def counts(self) -> CacheCounts:
        return self._lru.counts(self.nbytes)

    def compile(self) -> None:
        """Compiles all programs that pictures can need."""
        image = blank(self._model.config)
        for bucket in self._shapes:
            self._encode(image, bucket, 0)

    def entries(self, requests: Sequence[Reusable], width: int) -> np.ndarray:
        """(R, ``width``) int32, entries of the requests' pictures; those that are not there yet are encoded."""
        found = np.zeros((len(requests), width), np.int32)
        for r, request in enumerate(requests):
            for m, (image, key) in enumerate(zip(request.images, request.keys, strict=True)):
                entry = self._lru.find(key)
                if entry is None:
                    entry = self._lru.claim(key)
                    fits = (b for b in self._shapes if len(image) <= b.images[0] and len(image.crops) <= b.crops)
                    self._encode(image, next(fits), entry)
                found[r, m] = entry
        return found

    def _encode(self, image: ImageTokens, bucket: Bucket, entry: int) -> None:
        batch = assemble([Row([IMAGE_PLACEHOLDER] * image.parts, [image])], self._model.config, bucket)
        self.pool = encode(
            self._model.config,
            self._model.params,
            self.pool,
            rows_on_devices(self._model, batch),
            np.array([entry], np.int32),
            implementation=self._implementation,
        )


class PrefixCache:
    """What the first stage made of prompts up to the end of their last image: it drops nothing, so it holds for any
    question behind them. See ``multi_turn.rerank``, which does the same within a conversation.

    Args:
      buckets, nbytes, rows: as of ``ImageCache``.
    """

    def __init__(
        self, model: Model, buckets: Sequence[Bucket], nbytes: int, rows: int, implementation: Implementation
    ) -> None:
        config, layers = model.config, model.config.text.num_layers
        shown = [bucket for bucket in buckets if bucket.images]
        slots = max(config.schedule.plan(layers, bucket, aligned(implementation))[0].slots for bucket in shown)
        one = pool_bytes(empty_prefixes, config, 1, slots, model.dtype)
        check_room("prefix_cache", nbytes, one, rows + 1, "prompts")
        self._lru = Lru(nbytes // one - 1)  # the last entry is for rows that have nothing to keep
        with on_devices(model):
            self.pool = committed(model, empty_prefixes(config, self._lru.capacity + 1, slots, model.dtype))
        self.nbytes = one * (self._lru.capacity + 1)

    @staticmethod
    def applies(config: LlavaConfig) -> bool:
        """Whether a model has a first stage whose output can be ranked again."""
        return 0 not in config.schedule.layers and find_score(config).of_stage_output

    @property
    def counts(self) -> CacheCounts:
        return self._lru.counts(self.nbytes)

    def holds(self, request: Reusable) -> bool:
        return request.prefix in self._lru

    def entries(self, requests: Sequence[Reusable]) -> np.ndarray:
        """(R,) int32, entries of the requests' prefixes: those that they have, or that they may write."""
        found = np.full(len(requests), self._lru.capacity, np.int32)
        for r, request in enumerate(requests):
            if request.prefix is not None:
                entry = self._lru.find(request.prefix)
                found[r] = self._lru.claim(request.prefix) if entry is None else entry
        return found

    def waves(self, requests: Mapping[int, Reusable]) -> list[list[int]]:
        """The keys of requests that can be prefilled now, and of those whose prefix is that of one of these."""
        known: set[bytes] = set()
        first, second = list[int](), list[int]()
        for n, request in requests.items():
            (second if request.prefix in known else first).append(n)
            if request.prefix is not None and not self.holds(request):
                known.add(request.prefix)
        return [first, second]


def check_room(name: str, nbytes: int, one: int, needed: int, what: str) -> None:
    """Raises UserError unless ``nbytes`` hold ``needed`` entries of ``one`` bytes each."""
    if nbytes < needed * one:
        raise UserError(
            f"{name} of {nbytes:,} bytes holds {nbytes // one} {what} of {one:,} bytes each, but a prefill needs "
            f"{needed}: allow {needed * one:,} bytes, smaller buckets or fewer prefill_rows"
        )
