"""Answers to many questions: grouped by bucket, in batches of one size, the next one read while the device works.

Every batch of a bucket has the same shape, so that each bucket compiles once. A bucket is known from the text and from
the sizes of the pictures, of which only the heads are read; pictures themselves are in memory for two batches at most.
"""

import concurrent.futures
import dataclasses
from collections.abc import Container, Generator, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from pdrop_jax.batch import Batch, Bucket
from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import Question
from pdrop_jax.generation.engine import check_implementation, generate_batch
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.result import Generation
from pdrop_jax.generation.sampling import make_sampling
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import smallest_bucket
from pdrop_jax.inputs.images import as_tokens, measure, read_image
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model.attention import Implementation

MOST_ROWS = 4096  # of a batch: of 336 x 336 pixels each they are 5.5 GB before they reach a device


@dataclasses.dataclass(frozen=True)
class Group:
    """Questions that are answered as one batch.

    Attributes:
      bucket: of the batch.
      questions: positions in the list of all questions, ascending; at most as many as the batch has rows.
      ids: token ids of each, int32.
    """

    bucket: Bucket
    questions: list[int]
    ids: list[np.ndarray]


def plan(processor: Processor, questions: Sequence[Question], batch_size: int, max_new_tokens: int) -> list[Group]:
    """The batches of ``questions``, largest bucket first: what does not fit the device fails at once.

    Raises:
      UserError: a question does not fit the model, tags and pictures differ in number, the head of a picture cannot be
        read, or there is no such batch size.
    """
    check_batch_size(batch_size)
    config = processor.config
    buckets: dict[Bucket, list[tuple[int, np.ndarray]]] = {}
    with tqdm(questions, "measuring", unit=" questions", disable=None, delay=2, leave=False) as bar:
        for number, question in enumerate(bar):
            count = len(question.images)
            try:
                ids = np.array(processor.ids(question.text, count), np.int32)
                sizes = [measure(image, config, alone=count == 1) for image in question.images]
                bucket = smallest_bucket([len(ids) - count], [sizes], config, max_new_tokens)
            except UserError as error:
                raise _of(question, error) from None
            buckets.setdefault(bucket, []).append((number, ids))
    order = sorted(buckets, key=lambda bucket: (bucket.slots, bucket.crops, bucket.text), reverse=True)
    parts = [
        (bucket, buckets[bucket][at : at + batch_size])
        for bucket in order
        for at in range(0, len(buckets[bucket]), batch_size)
    ]
    return [Group(bucket, [number for number, _ in part], [ids for _, ids in part]) for bucket, part in parts]


def check_batch_size(batch_size: int) -> None:
    """Raises UserError if a batch of so many rows cannot be."""
    if not 1 <= batch_size <= MOST_ROWS:
        raise UserError(f"the batch size must lie in 1..{MOST_ROWS:,}, got {batch_size:,}")


def answer_all(
    model: Model,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    implementation: Implementation = "auto",
    answered: Container[int] = (),
) -> Generator[tuple[list[int], Generation]]:
    """Answers batch by batch, see ``plan`` for their order.

    The last batch of a bucket is filled up with its last question, of which the surplus answers are left out. What a
    batch draws at a temperature depends on ``seed`` and its place in the plan, not on the batches before it.

    Args:
      temperature: 0 is greedy; this and the others as in ``generation.generate``.
      answered: positions of questions that have been; a batch of nothing else is skipped.

    Yields:
      (positions in ``questions``, their answers): one row of the ``Generation`` for each, its seconds and bytes those
      of the whole batch.

    Raises:
      UserError: see ``plan``; a picture cannot be read, bad sampling values.
    """
    sampling = make_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    check_implementation(implementation)
    groups = plan(model.processor, questions, batch_size, max_new_tokens)
    todo = [(n, group) for n, group in enumerate(groups) if any(i not in answered for i in group.questions)]
    batches = read_batches(model.processor, questions, [group for _, group in todo], batch_size)
    for (number, group), batch in zip(todo, batches, strict=True):
        generation = generate_batch(
            model,
            batch,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed + number,
            implementation=implementation,
        )
        yield group.questions, _first_rows(generation, len(group.questions))


def read_batches(
    processor: Processor, questions: Sequence[Question], groups: Sequence[Group], batch_size: int
) -> Iterator[Batch]:
    """The batches of ``groups``, the next one read while the caller is at work; short ones are filled up.

    Raises:
      UserError: a picture cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        nexts = [reader.submit(_batch, processor, questions, group, batch_size) for group in groups[:1]]
        for at in range(len(groups)):
            batch = nexts.pop().result()
            for later in groups[at + 1 : at + 2]:
                nexts.append(reader.submit(_batch, processor, questions, later, batch_size))
            yield batch


def _batch(processor: Processor, questions: Sequence[Question], group: Group, batch_size: int) -> Batch:
    rows = []
    for number, ids in zip(group.questions, group.ids, strict=True):
        question = questions[number]
        alone = len(question.images) == 1
        try:
            images = [
                as_tokens(read_image(image), processor.image_processor, processor.config, alone=alone)
                for image in question.images
            ]
        except UserError as error:
            raise _of(question, error) from None
        rows.append(Row(ids, images))
    rows += rows[-1:] * (batch_size - len(rows))
    return assemble(rows, processor.config, group.bucket)


def _first_rows(generation: Generation, rows: int) -> Generation:
    names = ("texts", "token_ids", "stage_lengths", "image_tokens", "kept", "scores", "first_logits")
    return dataclasses.replace(generation, **{name: getattr(generation, name)[:rows] for name in names})


def _of(question: Question, error: UserError) -> UserError:
    return UserError(f"question {question.id!r}{question.where and f', {question.where}'}: {error}")
