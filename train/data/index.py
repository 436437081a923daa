"""Dataset: conversations are tokenized once and kept in memory; images are loaded when a batch needs them."""

import dataclasses
import functools
import hashlib
import itertools
import os
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
from pdrop_jax.inputs.images import as_tokens, blank, check_no_crops, measure_size, read_image
from pdrop_jax.inputs.prompts import PromptTemplate
from pdrop_jax.inputs.targets import with_captions
from pdrop_jax.train.data.batches import Planned, Sizes, batches_of, shapes_of
from pdrop_jax.train.data.examples import fit, read_example
from pdrop_jax.train.data.invalid import CORRUPT, InvalidRecord, Report, check_report
from pdrop_jax.train.data.mixture import rows_of_epoch, rows_per_source
from pdrop_jax.train.data.ragged import Ragged, RaggedBuilder
from pdrop_jax.train.data.sources.open_source import open_source
from pdrop_jax.train.data.sources.source import SEPARATOR, Source, reference_finder
from pdrop_jax.train.recipe import DataRecipe

CHUNK = 1024  # records per tokenizer call


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """The N usable rows of a data set or of a mixture of several, source after source.

    Attributes:
      data: the recipe's data section.
      sources: where the rows come from.
      counts: rows of each source.
      config: config of the model.
      image_processor: see ``inputs.images.load_image_processor``.
      ids: N rows of int32 token ids, with IMAGE_PLACEHOLDER for each image.
      spans: N rows of int32, start and stop of each run of target tokens in turn.
      pictures: N rows of uint8, references to images in UTF-8, separated by zero bytes; empty for rows without images.
        If the row was truncated, the last ones may have no placeholder.
      records: (N,) int64, number of the record in its source, starting at 1.
      sizes: sizes of the rows.
      invalid: number of skipped records, by reason.
    """

    data: DataRecipe
    config: LlavaConfig
    image_processor: Any
    sources: tuple[Source, ...]
    counts: tuple[int, ...]
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
        names = self.pictures[number].tobytes().decode().split(SEPARATOR)
        sizes = self.sizes.images[number].reshape(-1, 2).tolist()
        read = [
            self._image(number, name, size, alone=len(names) == 1)
            for name, size in zip(names, sizes, strict=False)  # more names than sizes if the row was truncated
        ]
        found = [image for image in read if image is not None]
        if len(found) == len(read):
            return Row(ids, found, labels), None
        # A picture that stands in the text in several parts has one for each of its crops.
        in_parts = int((ids == IMAGE_PLACEHOLDER).sum()) > len(read)
        parts = [crops if in_parts else 1 for crops, _ in sizes]
        pairs = zip(read, parts, strict=True)
        images = [blank(self.config, n) if image is None else image for image, n in pairs]
        return Row(ids, images, np.full_like(labels, IGNORE)), CORRUPT

    def _image(self, number: int, reference: str, size: list[int], alone: bool) -> ImageTokens | None:
        """Loads an image of row ``number``; None if it cannot be read, or not with its ``size`` in crops and tokens."""
        source = self.sources[np.searchsorted(np.cumsum(self.counts), number, side="right")]
        try:
            image = read_image(source.read(reference))
            tokens = as_tokens(image, self.image_processor, self.config, alone=alone)
            if [*tokens.size[:2]] != size:  # there may be no room for it in the batch
                raise UserError(f"{reference}: has another size than when the data were indexed")
            return tokens
        except UserError as error:
            if self.data.invalid == "skip":
                return None
            raise UserError(
                f'{source.path}, row {self.records[number]}: {error}: fix the image, or set data.invalid to "skip"'
            ) from None

    def plan_epoch(self, batch_size: int, seed: int, epoch: int) -> list[Planned]:
        """Plans the batches of ``epoch`` (from 0), identically in every process. The last incomplete batch is dropped.

        Args:
          batch_size: B, rows per batch over all processes.
          seed: RNG seed for shuffling.
        """
        rng = np.random.default_rng([seed, epoch])
        weights = self.weights
        rows = None if weights is None else rows_of_epoch(self.counts, weights, seed, epoch)
        batches = batches_of(rng, self.sizes, batch_size, self.data.group_by_length, rows)
        slots = _text_slots(self.data)
        shapes = shapes_of(batches, self.sizes, slots, self.config)
        return [Planned(rows, *shape) for rows, shape in zip(batches, shapes, strict=True)]

    @property
    def weights(self) -> list[float] | None:
        """The weight of each source; None if each row belongs to each epoch."""
        given = [source.weight for source in self.data.all_sources]
        return None if None in given else [weight for weight in given if weight is not None]

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
        if len(self.counts) > 1:
            digest.update(repr(self.counts).encode())
        return digest.hexdigest()


def open_dataset(data: DataRecipe, config: LlavaConfig, folder: str | os.PathLike, progress: bool = True) -> Dataset:
    """Reads and tokenizes the conversations of ``data`` for a model.

    Args:
      config: config of the model.
      folder: folder with the model's tokenizer and image processor.
      progress: show a progress bar if stderr is a terminal.

    Raises:
      UserError: a file or folder does not exist, has an unknown format or is damaged; a source has no conversations, or
        none that are usable; a record is invalid and ``data.invalid`` is "fail"; ``data.max_length`` exceeds the
        model's; or the tokenizer does not fit the model or the template.
    """
    processor = Processor.load(folder, config)
    prompts = processor.prompts(data.template)
    prompts.check_trainable()
    if data.max_length > config.text.max_length:
        raise UserError(
            f"data.max_length is {data.max_length}, but the model has {config.text.max_length} positions: lower it"
        )
    check_no_crops(processor.image_processor, config)
    rows = _Rows(data, processor, prompts)
    sources = [open_source(source.conversations, source.images) for source in data.all_sources]
    for source in sources:
        rows.read(source, progress)
    dataset = rows.build()
    if (highest := dataset.ids.values.max()) >= config.text.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} produces token ids up to {highest}, but the vocabulary of the model is "
            f"0..{config.text.vocab_size - 1}: use the tokenizer of this model"
        )
    if dataset.weights is not None:
        rows_per_source(dataset.counts, dataset.weights)  # each source has a row
    return dataset


def _text_slots(data: DataRecipe) -> tuple[int, ...]:
    return tuple(sorted({n for n in data.text_buckets if 0 < n < data.max_length} | {data.max_length}))


class _Rows:
    """Collects rows while the records are read."""

    def __init__(self, data: DataRecipe, processor: Processor, prompts: PromptTemplate) -> None:
        self.data, self.processor, self.config, self.prompts = data, processor, processor.config, prompts
        self.ids, self.spans, self.images = (RaggedBuilder(np.int32) for _ in range(3))
        self.pictures = RaggedBuilder(np.uint8)
        self.records: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.sources: list[Source] = []
        self.counts: list[int] = []
        self.invalid: Counter[str] = Counter()

    def read(self, source: Source, progress: bool) -> None:
        """Adds the rows of a source."""
        before, report = len(self.records), Report()
        find = reference_finder(source.images, self.data.outside_images)
        records = enumerate(source.records(), 1)
        name = printable(os.path.basename(source.path.rstrip("/")))
        with tqdm(desc=f"tokenizing {name}", unit=" rows", disable=None if progress else True) as bar:
            while chunk := list(itertools.islice(records, CHUNK)):
                self._add(source, chunk, find, report)
                bar.update(len(chunk))
        self.sources.append(source)
        self.counts.append(len(self.records) - before)
        self.invalid += report.invalid
        check_report(report, source.path)
        if report.invalid and self.data.invalid == "fail":
            raise UserError(
                f"{source.path}: {report.invalid.total()} of {report.seen} rows are invalid ({report.reasons}), "
                f"the first is row {report.first}: "
                'fix them, or set data.invalid to "skip"'
            )

    def _add(
        self, source: Source, numbered: Iterable[tuple[int, Any]], find: Callable[[Any], str], report: Report
    ) -> None:
        read = []
        for number, record in numbered:
            report.seen += 1
            try:
                text, pictures = read_example(record, self.prompts, find)
                sizes = self._sizes(source, pictures)
            except InvalidRecord as error:
                report.add(number, error)
                continue
            text = with_captions(text, [size.texts for size in sizes], self.prompts.place)
            read.append((number, text, pictures, sizes))
        examples = self.prompts.tokenize([text for _, text, _, _ in read])
        for (number, _, pictures, sizes), example in zip(read, examples, strict=True):
            try:
                example, images = fit(example, self.data.max_length, sizes, self.data.too_long)
            except InvalidRecord as error:
                report.add(number, error)
                continue
            runs = _runs(example.labels != IGNORE)
            self.ids.append(example.ids)
            self.spans.append(runs.ravel())
            self.images.append(np.array([(size.crops, size.tokens) for size in sizes[:images]]).ravel())
            self.pictures.append(np.frombuffer(SEPARATOR.join(pictures).encode() if images else b"", np.uint8))
            self.records.append(number)
            text_tokens = int((example.ids != IMAGE_PLACEHOLDER).sum())
            self.sizes.append((text_tokens, int((runs[:, 0] > 0).sum())))

    def _sizes(self, source: Source, pictures: list[str]) -> list[ImageSize]:
        processor, alone = self.processor.image_processor, len(pictures) == 1
        try:
            return [
                measure_size(functools.partial(source.size, name), processor, self.config, alone=alone)
                for name in pictures
            ]
        except UserError as error:
            raise InvalidRecord(CORRUPT, str(error)) from None

    def build(self) -> Dataset:
        text, queries = np.array(self.sizes, np.int32).T
        return Dataset(
            data=self.data,
            config=self.config,
            image_processor=self.processor.image_processor,
            sources=tuple(self.sources),
            counts=tuple(self.counts),
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
