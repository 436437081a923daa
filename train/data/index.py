"""Dataset: conversations, tokenized once and kept in memory; pictures stay on disk until a batch needs them."""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from tqdm import tqdm

from pdrop_jax.batch import IGNORE, Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError, printable
from pdrop_jax.inputs import Processor, Row
from pdrop_jax.inputs.anyres import ImageTokens, whole
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER, template_named
from pdrop_jax.inputs.images import as_tokens, measure, read_image
from pdrop_jax.inputs.targets import ends_answers, tokenize
from pdrop_jax.io import inside
from pdrop_jax.train.data.batches import Planned, Sizes, batches_of, shapes_of
from pdrop_jax.train.data.examples import CORRUPT, OUTSIDE, InvalidRecord, fit, read_example, read_records
from pdrop_jax.train.data.ragged import Ragged, RaggedBuilder
from pdrop_jax.train.recipe import DataRecipe

CHUNK = 1024  # records that are tokenized together


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """The usable rows of a data set, N of them.

    Attributes:
      data: what was asked for.
      config: of the model.
      image_processor: see ``inputs.images.load_image_processor``.
      ids: N rows of int32 token ids, IMAGE_PLACEHOLDER for a picture.
      spans: N rows of int32, start and stop of each run of targets in turn.
      pictures: N rows of uint8, the names of the pictures in UTF-8 with a zero between them; empty without any. The
        last ones have no placeholder if the row was cut.
      records: (N,) int64, where in the file the row stands, from 1.
      sizes: of each row.
      invalid: rows that are left out, by reason.
    """

    data: DataRecipe
    config: LlavaConfig
    image_processor: Any
    ids: Ragged
    spans: Ragged
    pictures: Ragged
    records: np.ndarray
    sizes: Sizes
    invalid: Counter[str]

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, number: int) -> tuple[Row, str | None]:
        """Row ``number`` with its pictures, and why one could not be read, if so.

        A row with a picture that cannot be read keeps its ids, with a grey one in its place and no target: it weighs
        nothing.

        Raises:
          UserError: a picture cannot be read and ``data.invalid`` is "fail".
        """
        ids = self.ids[number]
        labels = np.full(len(ids), IGNORE, np.int32)
        for start, stop in self.spans[number].reshape(-1, 2):
            labels[start:stop] = ids[start:stop]
        names = self.pictures[number].tobytes().decode().split("\0")
        shown = names[: len(self.sizes.images[number]) // 2]
        read = [self._image(number, name, alone=len(names) == 1) for name in shown]
        found = [image for image in read if image is not None]
        if len(found) == len(read):
            return Row(ids, found, labels), None
        size = self.config.vision.image_size
        grey = whole(np.zeros((size, size, 3), np.float32), self.config)
        return Row(ids, [grey if image is None else image for image in read], np.full_like(labels, IGNORE)), CORRUPT

    def _image(self, number: int, name: str, alone: bool) -> ImageTokens | None:
        """A picture of row ``number``; None if it cannot be read."""
        try:
            image = read_image(os.path.join(self.data.images, name))
            return as_tokens(image, self.image_processor, self.config, alone=alone)
        except UserError as error:
            if self.data.invalid == "skip":
                return None
            raise UserError(
                f"{self.data.conversations}, row {self.records[number]}: {error}: put it right, or set data.invalid to "
                '"skip"'
            ) from None

    def plan(self, batch_size: int, seed: int, epoch: int) -> list[Planned]:
        """The batches of ``epoch`` (from 0), the same in every process. The last incomplete one is left out.

        Args:
          batch_size: B, rows of all processes together.
        """
        rng = np.random.default_rng([seed, epoch])
        batches = batches_of(rng, self.sizes, batch_size, self.data.group_by_length)
        slots = _text_slots(self.data)
        shapes = shapes_of(batches, self.sizes, slots, self.config)
        return [Planned(rows, *shape) for rows, shape in zip(batches, shapes, strict=True)]

    def shapes(self, batch_size: int, seed: int, epochs: int = 1) -> set[tuple[Bucket, int]]:
        """What a step will be compiled for in the first ``epochs``: buckets, each with its number of query rows."""
        return {
            (planned.bucket, planned.queries)
            for epoch in range(epochs)
            for planned in self.plan(batch_size, seed, epoch)
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of everything that the order and the contents of batches follow from, but for the pictures themselves."""
        digest = hashlib.blake2b(digest_size=16)
        for rows in (self.ids, self.spans, self.pictures):
            digest.update(rows.ends.tobytes())
            digest.update(rows.values.tobytes())
        return digest.hexdigest()


def open_dataset(data: DataRecipe, config: LlavaConfig, folder: str | os.PathLike, progress: bool = True) -> Dataset:
    """Read and tokenize the conversations of ``data`` for a model.

    Args:
      folder: where the model's tokenizer and image processor are.
      progress: show it, on a terminal.

    Raises:
      UserError: a file or folder that does not exist, no conversation, none that is usable, an invalid one if
        ``data.invalid`` is "fail", a limit that the model does not have, a tokenizer that does not fit model or
        template.
    """
    processor = Processor.load(folder, config)
    _check(data, config, processor.tokenizer, folder)
    path = pathlib.Path(data.conversations)
    rows = _Rows(data, config, processor.tokenizer)
    records = enumerate(read_records(path), 1)
    bar = tqdm(desc=f"tokenizing {printable(path.name)}", unit=" rows", disable=None if progress else True)
    with bar:
        while chunk := list(itertools.islice(records, CHUNK)):
            rows.add(chunk)
            bar.update(len(chunk))
    if not rows.seen:
        raise UserError(f"{path} holds no conversation")
    reasons = ", ".join(f"{count} {reason}" for reason, count in rows.invalid.most_common())
    if not rows.records:
        raise UserError(f"{path} holds no usable row: all {rows.seen} are invalid ({reasons})")
    if rows.invalid and data.invalid == "fail":
        raise UserError(
            f"{path}: {rows.invalid.total()} of {rows.seen} rows are invalid ({reasons}), "
            f"first row {rows.first_invalid}: "
            'put them right, or set data.invalid to "skip"'
        )
    dataset = rows.build(processor.image_processor)
    if (highest := dataset.ids.values.max()) >= config.text.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} gives token ids up to {highest} but the model knows "
            f"0..{config.text.vocab_size - 1}: it belongs to another model"
        )
    return dataset


def _check(data: DataRecipe, config: LlavaConfig, tokenizer: Any, folder: str | os.PathLike) -> None:
    if not ends_answers(tokenizer, data.template):
        raise UserError(
            f"template {data.template!r} ends an answer with {template_named(data.template).end_token}, which the "
            f"tokenizer in {folder} does not have as one token, so nothing would be learned: choose another template"
        )
    if data.max_length > config.text.max_length:
        raise UserError(
            f"data.max_length is {data.max_length} but the model has {config.text.max_length} positions: lower it"
        )
    if not os.path.isdir(data.images):
        raise UserError(f"data.images: there is no folder {data.images}")


def _text_slots(data: DataRecipe) -> tuple[int, ...]:
    return tuple(sorted({n for n in data.text_buckets if 0 < n < data.max_length} | {data.max_length}))


class _Rows:
    """Rows as they are read."""

    def __init__(self, data: DataRecipe, config: LlavaConfig, tokenizer: Any) -> None:
        self.data, self.config, self.tokenizer = data, config, tokenizer
        self.is_file = file_finder(data.images, data.outside_images)
        self.ids, self.spans, self.images = (RaggedBuilder(np.int32) for _ in range(3))
        self.pictures = RaggedBuilder(np.uint8)
        self.records: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.invalid: Counter[str] = Counter()
        self.seen, self.first_invalid = 0, 0

    def add(self, numbered: Iterable[tuple[int, Any]]) -> None:
        read = []
        for number, record in numbered:
            self.seen = number
            try:
                read.append((number, *read_example(record, self.data.template, self.is_file)))
            except InvalidRecord as error:
                self._leave_out(number, error.reason)
        examples = tokenize(self.tokenizer, [text for _, text, _ in read], self.data.template)
        for (number, _, pictures), example in zip(read, examples, strict=True):
            try:
                sizes = self._sizes(pictures)
                example = fit(example, self.data.max_length, [tokens for _, tokens in sizes], self.data.too_long)
            except InvalidRecord as error:
                self._leave_out(number, error.reason)
                continue
            images = int((example.ids == IMAGE_PLACEHOLDER).sum())
            runs = _runs(example.labels != IGNORE)
            self.ids.append(example.ids)
            self.spans.append(runs.ravel())
            self.images.append(np.array(sizes[:images]).ravel())
            self.pictures.append(np.frombuffer("\0".join(pictures).encode() if images else b"", np.uint8))
            self.records.append(number)
            self.sizes.append((len(example.ids) - images, int((runs[:, 0] > 0).sum())))

    def _sizes(self, pictures: list[str]) -> list[tuple[int, int]]:
        """Crops and tokens of each."""
        alone = len(pictures) == 1
        try:
            sizes = [measure(os.path.join(self.data.images, name), self.config, alone=alone) for name in pictures]
        except UserError:
            raise InvalidRecord(CORRUPT) from None
        return [(size.crops, size.tokens) for size in sizes]

    def _leave_out(self, number: int, reason: str) -> None:
        self.invalid[reason] += 1
        self.first_invalid = min(self.first_invalid or number, number)

    def build(self, image_processor: Any) -> Dataset:
        text, queries = np.array(self.sizes, np.int32).T
        sizes = Sizes(text, queries, self.images.build())
        parts = self.ids.build(), self.spans.build(), self.pictures.build()
        return Dataset(
            self.data, self.config, image_processor, *parts, np.array(self.records), sizes, Counter(self.invalid)
        )


def _runs(mask: np.ndarray) -> np.ndarray:
    """(runs, 2), start and stop of each run of true values."""
    return np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)


def file_finder(folder: str, outside: bool = False) -> Callable[[str], bool]:
    """A function that says whether there is a file of a name below ``folder``.

    It lists each folder once: asking for every file by itself takes minutes where the pictures lie on another machine.

    Args:
      outside: whether a name may leave ``folder``, as ``../1.png`` or ``/etc/1.png``. Otherwise the function raises
        InvalidRecord for it. Names alone are looked at: a link in ``folder`` may lead anywhere.
    """

    @functools.cache
    def names(parent: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(parent))
        except (OSError, ValueError):
            return frozenset()

    def is_file(name: str) -> bool:
        if not outside and name and not inside(folder, name):
            raise InvalidRecord(OUTSIDE)
        parent, own = os.path.split(os.path.join(folder, name))
        return own in names(parent)

    return is_file
