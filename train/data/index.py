"""Dataset: conversations are tokenized once and kept in memory; images are loaded when a batch needs them."""

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
from pdrop_jax.inputs.anyres import ImageSize, ImageTokens
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.images import as_tokens, blank, check_no_crops, measure, read_image
from pdrop_jax.inputs.prompts import PromptTemplate
from pdrop_jax.inputs.targets import with_captions
from pdrop_jax.io import inside
from pdrop_jax.train.data.batches import Planned, Sizes, batches_of, shapes_of
from pdrop_jax.train.data.examples import CORRUPT, OUTSIDE, InvalidRecord, fit, read_example, read_records
from pdrop_jax.train.data.ragged import Ragged, RaggedBuilder
from pdrop_jax.train.recipe import DataRecipe

CHUNK = 1024  # records per tokenizer call


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """The N usable rows of a data set.

    Attributes:
      data: the recipe's data section.
      config: config of the model.
      image_processor: see ``inputs.images.load_image_processor``.
      ids: N rows of int32 token ids, with IMAGE_PLACEHOLDER for each image.
      spans: N rows of int32, start and stop of each run of target tokens in turn.
      pictures: N rows of uint8, image file names in UTF-8, separated by zero bytes; empty for rows without images. If
        the row was truncated, the last names may have no placeholder.
      records: (N,) int64, number of the record in the file, starting at 1.
      sizes: sizes of the rows.
      invalid: number of skipped records, by reason.
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
        """Loads row ``number`` with its images. Returns the row, and a reason if an image could not be read.

        Such a row keeps its token ids, but has a gray image in place of the unreadable one and no targets, so it does
        not contribute to the loss.

        Raises:
          UserError: an image cannot be read and ``data.invalid`` is "fail".
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
        crops = self.sizes.images[number][::2].tolist()
        # A picture that stands in the text in several parts has one for each of its crops.
        parts = crops if int((ids == IMAGE_PLACEHOLDER).sum()) > len(read) else [1] * len(read)
        pairs = zip(read, parts, strict=True)
        images = [blank(self.config, n) if image is None else image for image, n in pairs]
        return Row(ids, images, np.full_like(labels, IGNORE)), CORRUPT

    def _image(self, number: int, name: str, alone: bool) -> ImageTokens | None:
        """Loads an image of row ``number``; None if it cannot be read."""
        try:
            image = read_image(os.path.join(self.data.images, name))
            return as_tokens(image, self.image_processor, self.config, alone=alone)
        except UserError as error:
            if self.data.invalid == "skip":
                return None
            raise UserError(
                f"{self.data.conversations}, row {self.records[number]}: {error}: fix the image, or set "
                'data.invalid to "skip"'
            ) from None

    def plan_epoch(self, batch_size: int, seed: int, epoch: int) -> list[Planned]:
        """Plans the batches of ``epoch`` (from 0), identically in every process. The last incomplete batch is dropped.

        Args:
          batch_size: B, rows per batch over all processes.
          seed: RNG seed for shuffling.
        """
        rng = np.random.default_rng([seed, epoch])
        batches = batches_of(rng, self.sizes, batch_size, self.data.group_by_length)
        slots = _text_slots(self.data)
        shapes = shapes_of(batches, self.sizes, slots, self.config)
        return [Planned(rows, *shape) for rows, shape in zip(batches, shapes, strict=True)]

    def shapes(self, batch_size: int, seed: int, epochs: int = 1) -> set[tuple[Bucket, int]]:
        """Shapes that a step is compiled for in the first ``epochs``: pairs of bucket and number of query rows."""
        return {
            (planned.bucket, planned.queries)
            for epoch in range(epochs)
            for planned in self.plan_epoch(batch_size, seed, epoch)
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the order and contents of batches, except the pixels of the images."""
        digest = hashlib.blake2b(digest_size=16)
        for rows in (self.ids, self.spans, self.pictures):
            digest.update(rows.ends.tobytes())
            digest.update(rows.values.tobytes())
        return digest.hexdigest()


def open_dataset(data: DataRecipe, config: LlavaConfig, folder: str | os.PathLike, progress: bool = True) -> Dataset:
    """Reads and tokenizes the conversations of ``data`` for a model.

    Args:
      config: config of the model.
      folder: folder with the model's tokenizer and image processor.
      progress: show a progress bar if stderr is a terminal.

    Raises:
      UserError: a file or folder does not exist; there are no conversations, or none that are usable; a record is
        invalid and ``data.invalid`` is "fail"; ``data.max_length`` exceeds the model's; or the tokenizer does not fit
        the model or the template.
    """
    processor = Processor.load(folder, config)
    prompts = processor.prompts(data.template)
    prompts.check_trainable()
    _check(data, config)
    check_no_crops(processor.image_processor, config)
    path = pathlib.Path(data.conversations)
    rows = _Rows(data, processor, prompts)
    records = enumerate(read_records(path), 1)
    bar = tqdm(desc=f"tokenizing {printable(path.name)}", unit=" rows", disable=None if progress else True)
    with bar:
        while chunk := list(itertools.islice(records, CHUNK)):
            rows.add(chunk)
            bar.update(len(chunk))
    if not rows.seen:
        raise UserError(f"{path} contains no conversations: expected at least one record")
    reasons = ", ".join(f"{count} {reason}" for reason, count in rows.invalid.most_common())
    if not rows.records:
        raise UserError(f"{path} contains no usable rows: all {rows.seen} are invalid ({reasons})")
    if rows.invalid and data.invalid == "fail":
        raise UserError(
            f"{path}: {rows.invalid.total()} of {rows.seen} rows are invalid ({reasons}), "
            f"the first is row {rows.first_invalid}: "
            'fix them, or set data.invalid to "skip"'
        )
    dataset = rows.build()
    if (highest := dataset.ids.values.max()) >= config.text.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} produces token ids up to {highest}, but the vocabulary of the model is "
            f"0..{config.text.vocab_size - 1}: use the tokenizer of this model"
        )
    return dataset


def _check(data: DataRecipe, config: LlavaConfig) -> None:
    if data.max_length > config.text.max_length:
        raise UserError(
            f"data.max_length is {data.max_length}, but the model has {config.text.max_length} positions: lower it"
        )
    if not os.path.isdir(data.images):
        raise UserError(f"data.images is {data.images}, which is not a folder: set it to the folder of the images")


def _text_slots(data: DataRecipe) -> tuple[int, ...]:
    return tuple(sorted({n for n in data.text_buckets if 0 < n < data.max_length} | {data.max_length}))


class _Rows:
    """Collects rows while the records are read."""

    def __init__(self, data: DataRecipe, processor: Processor, prompts: PromptTemplate) -> None:
        self.data, self.processor, self.config, self.prompts = data, processor, processor.config, prompts
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
                text, pictures = read_example(record, self.prompts, self.is_file)
                sizes = self._sizes(pictures)
            except InvalidRecord as error:
                self._skip(number, error.reason)
                continue
            text = with_captions(text, [size.texts for size in sizes], self.prompts.place)
            read.append((number, text, pictures, sizes))
        examples = self.prompts.tokenize([text for _, text, _, _ in read])
        for (number, _, pictures, sizes), example in zip(read, examples, strict=True):
            try:
                example, images = fit(example, self.data.max_length, sizes, self.data.too_long)
            except InvalidRecord as error:
                self._skip(number, error.reason)
                continue
            runs = _runs(example.labels != IGNORE)
            self.ids.append(example.ids)
            self.spans.append(runs.ravel())
            self.images.append(np.array([(size.crops, size.tokens) for size in sizes[:images]]).ravel())
            self.pictures.append(np.frombuffer("\0".join(pictures).encode() if images else b"", np.uint8))
            self.records.append(number)
            text_tokens = int((example.ids != IMAGE_PLACEHOLDER).sum())
            self.sizes.append((text_tokens, int((runs[:, 0] > 0).sum())))

    def _sizes(self, pictures: list[str]) -> list[ImageSize]:
        alone = len(pictures) == 1
        try:
            paths = [os.path.join(self.data.images, name) for name in pictures]
            return [measure(path, self.processor.image_processor, self.config, alone=alone) for path in paths]
        except UserError:
            raise InvalidRecord(CORRUPT) from None

    def _skip(self, number: int, reason: str) -> None:
        self.invalid[reason] += 1
        self.first_invalid = min(self.first_invalid or number, number)

    def build(self) -> Dataset:
        text, queries = np.array(self.sizes, np.int32).T
        return Dataset(
            data=self.data,
            config=self.config,
            image_processor=self.processor.image_processor,
            ids=self.ids.build(),
            spans=self.spans.build(),
            pictures=self.pictures.build(),
            records=np.array(self.records),
            sizes=Sizes(text, queries, self.images.build()),
            invalid=Counter(self.invalid),
        )


def _runs(mask: np.ndarray) -> np.ndarray:
    """(runs, 2), start and stop of each run of True in a 1-D mask."""
    return np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)


def file_finder(folder: str, outside: bool = False) -> Callable[[str], bool]:
    """Returns a function that checks whether a file with a given name exists below ``folder``.

    The function lists each directory only once. Checking every file separately takes minutes on network file systems.

    Args:
      outside: whether a name may leave ``folder``, such as ``../1.png`` or ``/etc/1.png``. Otherwise the function
        raises InvalidRecord for such names. Only names are checked: a symbolic link in ``folder`` may point anywhere.
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
