"""Answers many questions: grouped by bucket, in batches of one size, reading the next batch while the device works.

All batches of a bucket have the same shape, so each bucket compiles once. A question's bucket follows from its text and
the sizes of its images, for which only file headers are read. Images of at most two batches are in memory at a time.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Container, Generator, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from pdrop_jax.batch import Batch, Bucket
from pdrop_jax.config import Implementation
from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import Question
from pdrop_jax.eval.shares import Share
from pdrop_jax.generation.engine import check_implementation, generate_batch
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.result import Generation
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import smallest_bucket
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.downsample import downsampled, measure_downsampled
from pdrop_jax.inputs.images import as_tokens, measure, read_image
from pdrop_jax.inputs.messages import read_conversation
from pdrop_jax.inputs.processor import Processor

MOST_ROWS = 4096  # in a batch: at 336 x 336 pixels each, 5.5 GB of float32 before they reach a device


@dataclasses.dataclass(frozen=True)
class Group:
    """Questions that are answered as one batch.

    Attributes:
      bucket: bucket of the batch.
      questions: positions in the list of all questions, ascending; at most one for each row of the batch.
      ids: int32 token ids of each question.
    """

    bucket: Bucket
    questions: list[int]
    ids: list[np.ndarray]


def plan_batches(
    processor: Processor,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    tokens_of: Callable[[int], int] | None = None,
) -> list[Group]:
    """Splits ``questions`` into batches, largest bucket first, so that a batch too large for the device fails at once.

    Args:
      tokens_of: see ``read_batches``.

    Raises:
      UserError: a question does not fit the model, image tags and images differ in number, the header of an image
        cannot be read, or the batch size is out of range.
    """
    check_batch_size(batch_size)
    config = processor.config
    size_of = measure if tokens_of is None else functools.partial(measure_downsampled, tokens_of=tokens_of)
    buckets: dict[Bucket, list[tuple[int, np.ndarray]]] = {}
    with tqdm(questions, "measuring", unit=" questions", disable=None, delay=2, leave=False) as bar:
        for number, question in enumerate(bar):
            count = len(question.images)
            try:
                messages, _ = read_conversation(question.text, question.images)
                sizes = [
                    size_of(image, processor=processor.image_processor, config=config, alone=count == 1)
                    for image in question.images
                ]
                ids = np.array(processor.prompts().ids(messages, [size.texts for size in sizes]), np.int32)
                text = int((ids != IMAGE_PLACEHOLDER).sum())
                bucket = smallest_bucket([text], [sizes], config, max_new_tokens)
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
    """Raises UserError if the batch size is out of range."""
    if not 1 <= batch_size <= MOST_ROWS:
        raise UserError(f"the batch size must be in 1..{MOST_ROWS:,}, got {batch_size:,}")


def answer_all(
    model: Model,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    sampling: Sampling = Sampling(max_new_tokens=128),
    implementation: Implementation = "auto",
    answered: Container[int] = (),
    share: Share = Share(),
) -> Generator[tuple[list[int], Generation]]:
    """Answers batch by batch, in the order of ``plan_batches``.

    The last batch of a bucket is padded with copies of its last question, whose answers are left out. The samples of a
    batch depend on the seed and on its position in the plan, not on the batches before it.

    Args:
      answered: positions of questions that have been answered already; a batch of only such questions is skipped.
      share: the batches to answer.

    Yields:
      (positions in ``questions``, their answers): one row of the ``Generation`` for each; its seconds and bytes are
      those of the whole batch.

    Raises:
      UserError: see ``plan_batches``; a picture cannot be read.
    """
    check_implementation(implementation)
    groups = plan_batches(model.processor, questions, batch_size, sampling.max_new_tokens)
    todo = [
        (n, group) for n, group in enumerate(groups) if n in share and any(i not in answered for i in group.questions)
    ]
    batches = read_batches(model.processor, questions, [group for _, group in todo], batch_size)
    for (number, group), batch in zip(todo, batches, strict=True):
        generation = generate_batch(model, batch, sampling.for_batch(number), implementation=implementation)
        yield group.questions, _first_rows(generation, len(group.questions))


def read_batches(
    processor: Processor,
    questions: Sequence[Question],
    groups: Sequence[Group],
    batch_size: int,
    tokens_of: Callable[[int], int] | None = None,
) -> Iterator[Batch]:
    """Yields the batches of ``groups``, reading the next one while the caller works; short batches are padded.

    Args:
      tokens_of: how many tokens an image has in place of the n that it would have, see ``downsampled``; None is all.

    Raises:
      UserError: a picture cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        nexts = [reader.submit(_batch, processor, questions, group, batch_size, tokens_of) for group in groups[:1]]
        for at in range(len(groups)):
            batch = nexts.pop().result()
            for later in groups[at + 1 : at + 2]:
                nexts.append(reader.submit(_batch, processor, questions, later, batch_size, tokens_of))
            yield batch


def _batch(
    processor: Processor,
    questions: Sequence[Question],
    group: Group,
    batch_size: int,
    tokens_of: Callable[[int], int] | None,
) -> Batch:
    rows, settings, config = [], processor.image_processor, processor.config
    for number, ids in zip(group.questions, group.ids, strict=True):
        question = questions[number]
        alone = len(question.images) == 1
        try:
            images = [
                downsampled(read_image(image), tokens_of, settings, config, alone=alone)
                if tokens_of
                else as_tokens(read_image(image), settings, config, alone=alone)
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
